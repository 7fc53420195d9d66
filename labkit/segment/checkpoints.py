"""Which weights each profile uses: one table of pins, and one way to fetch and check them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

from labkit.files import download_from_hub, has_digest
from labkit.runtime import InputError, SourceError, find_root_cause


@dataclass(frozen=True, kw_only=True)
class _Pin:
    """A repository of the hub at a revision, or a folder, and the digest of the weights in it.

    In a folder, a digest of "" means that it is not checked.
    """

    source: str
    revision: str = "main"
    digest: str = ""

    @property
    def name(self) -> str:
        """For a reader: the source and its revision."""
        if self._is_folder:
            return f"{Path(self.source).name} (local)"
        return f"{self.source} at {self.revision[:12]}"

    @property
    def _is_folder(self) -> bool:
        return Path(self.source).is_dir()

    def _weights(self, filename: str) -> Path:
        """The file of the weights, downloaded if need be; then the cache is enough."""
        if self._is_folder:
            _check_local(Path(self.source) / filename, self.digest)
            return Path(self.source) / filename
        try:
            return download_from_hub(
                self.source, filename, revision=self.revision, digest=self.digest
            )
        except SourceError as error:
            raise SourceError(f"{str(error).rstrip('.')}. {_REMEDY}") from error


@dataclass(frozen=True, kw_only=True)
class ClipSegPin(_Pin):
    """A CLIPSeg: files as transformers saves them; the digest is that of `model.safetensors`."""

    def folder(self) -> Path:
        """The folder that holds the files, downloaded if need be; then the cache is enough.

        Raises:
            SourceError: they could not be had, or the weights have another digest.
        """
        folder = Path(self.source) if self._is_folder else _snapshot(self.source, self.revision)
        self._weights("model.safetensors")
        return folder


@dataclass(frozen=True, kw_only=True)
class Sam2Pin(_Pin):
    """A SAM-2 checkpoint, and the configuration of its architecture.

    `config` is a YAML file: a path, or a name among those of the sam2 package.
    """

    filename: str
    config: str

    def file(self) -> Path:
        """The checkpoint, downloaded and checked if need be.

        Raises:
            SourceError: it could not be had, or has another digest.
        """
        return self._weights(self.filename)

    def config_file(self) -> Path:
        """The YAML file of the architecture."""
        path = Path(self.config)
        if not path.is_absolute():
            path = Path(str(files("sam2"))) / "configs" / self.config
        if not path.is_file():
            raise SourceError(f"there is no SAM-2 configuration {path}")
        return path


@dataclass(frozen=True, kw_only=True)
class PresencePin:
    """How evidence becomes a presence score; see `labkit.segment.presence`.

    Weights of the logit of strength, of contrast, of rivalry and of agreement, and a constant.
    """

    strength: float
    contrast: float
    rivalry: float
    agreement: float
    constant: float
    cut: float = 0.5


@dataclass(frozen=True, kw_only=True)
class Profile:
    """What one profile runs on; `note` stands on the face of all that it produces."""

    clipseg: ClipSegPin
    sam2: Mapping[str, Sam2Pin]
    default_sam2: str
    presence: PresencePin
    templates: tuple[str, ...]
    note: str = ""

    def sam2_pin(self, size: str | None) -> Sam2Pin:
        """The checkpoint called `size`; the default one for None.

        Raises:
            InputError: there is none of that name.
        """
        name = size or self.default_sam2
        if name not in self.sam2:
            raise InputError(f"sam2 must be one of {', '.join(self.sam2)}, got {name!r}")
        return self.sam2[name]


def _published(size: str, short: str, digest: str, revision: str = "main") -> Sam2Pin:
    return Sam2Pin(
        source=f"facebook/sam2.1-hiera-{size}",
        filename=f"sam2.1_hiera_{size.replace('-', '_')}.pt",
        config=f"sam2.1/sam2.1_hiera_{short}.yaml",
        revision=revision,
        digest=f"sha256:{digest}",
    )


_REMEDY = "Check the network and the source, or choose profile='demo', which needs neither."
_ASSETS = Path(str(files("labkit"))) / "assets"

_FULL = Profile(
    clipseg=ClipSegPin(
        source="CIDAS/clipseg-rd64-refined",
        revision="999e0328d9e10b484360c477313983f9afdd7050",
        digest="sha256:d00ca85d6b859f9d07b7cfb8ef26fe9771cb275b34c9368f2ecf603139307f55",
    ),
    sam2={
        "tiny": _published(
            "tiny", "t", "7402e0d864fa82708a20fbd15bc84245c2f26dff0eb43a4b5b93452deb34be69"
        ),
        "small": _published(
            "small", "s", "6d1aa6f30de5c92224f8172114de081d104bbd23dd9dc5c58996f0cad5dc4d38"
        ),
        "base-plus": _published(
            "base-plus", "b+", "a2345aede8715ab1d5d31b4a509fb160c5a4af1970f199d9054ccfb746c004c5"
        ),
        "large": _published(
            "large",
            "l",
            "2647878d5dfa5098f2f8649825738a9345572bae2d4350a2468587ece47dd318",
            revision="665f8e2ad61cf5f53d65644ff27c8ee525124610",
        ),
    },
    default_sam2="large",
    # Not calibrated, since no annotated photographs were at hand: with agreement 0.6 and the ground
    # at 0, a probability of 0.3, the threshold published for CLIPSeg, lies just above the cut.
    presence=PresencePin(strength=1.5, contrast=3.0, rivalry=-3.0, agreement=1.0, constant=-0.2),
    templates=("a photo of a {}",),
)


def check_installed() -> None:
    """Make sure that what segmentation needs beyond labkit's own dependencies is there.

    Raises:
        SourceError: it is not; the message says how to install it.
    """
    needed = ("transformers", "sam2", "hydra", "iopath", "skimage", "pycocotools")
    missing = [name for name in needed if find_spec(name) is None]
    if missing:
        raise SourceError(
            f"segmentation needs {', '.join(missing)}: pip install 'labkit[segment]', then "
            "SAM2_BUILD_CUDA=0 pip install --no-build-isolation --no-deps sam2"
        )


def get_profile(name: str) -> Profile:
    """The profile "full", of the published weights, or "demo", of those that come with labkit.

    Raises:
        InputError: `name` is neither.
        SourceError: the files of "demo" are not all there.
    """
    if name == "full":
        return _FULL
    if name != "demo":
        raise InputError(f"profile must be 'full' or 'demo', got {name!r}")
    about = _ASSETS / "demo.json"
    if not about.is_file():
        raise SourceError(f"there is no {about}; install labkit anew, its assets are missing")
    facts = json.loads(about.read_text())
    return Profile(
        clipseg=ClipSegPin(source=str(_ASSETS / "clipseg-tiny"), digest=facts["clipseg"]),
        sam2={
            "demo": Sam2Pin(
                source=str(_ASSETS / "sam2-tiny"),
                filename="sam2.safetensors",
                config=str(_ASSETS / "sam2-tiny" / "sam2.yaml"),
                digest=facts["sam2"],
            )
        },
        default_sam2="demo",
        presence=PresencePin(**facts["presence"]),
        templates=("{}", "a photo of a {}"),
        note="demo: tiny models trained on procedural scenes",
    )


def _check_local(file: Path, digest: str) -> None:
    if not file.is_file():
        raise SourceError(f"there is no {file}. {_REMEDY}")
    if digest and not has_digest(file, digest):
        raise SourceError(
            f"{file} has a wrong checksum (expected {digest}): it was altered or cut short. "
            "Put the original back, or install labkit anew."
        )


def _snapshot(repo: str, revision: str) -> Path:
    """The files of `repo` but for its weights, from the hub or, failing that, from its cache."""
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.txt"]
    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=patterns))
    except Exception as error:  # its own, httpx's and the system's have no common base
        raise SourceError(
            f"could not download {repo}: {find_root_cause(error)}. {_REMEDY}"
        ) from error
