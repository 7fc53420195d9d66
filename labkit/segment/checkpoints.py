"""Which weights each profile uses: a table of checkpoints, and how they are fetched and checked."""

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
class Checkpoint:
    """A file of weights, in a repository of the Hugging Face hub or in a folder.

    Attributes:
        source: the repository, "owner/name", or the path of a folder.
        filename: the file of the weights in it.
        revision: the commit of the repository, or "main".
        digest: expected checksum of the file, "sha256:..." in hex. In a folder it may be "", which
            means that nothing is checked.
    """

    source: str
    filename: str = "model.safetensors"
    revision: str = "main"
    digest: str = ""

    @property
    def name(self) -> str:
        """The source and its revision, for reports."""
        if self._is_folder:
            return f"{Path(self.source).name} (local)"
        return f"{self.source} at {self.revision[:12]}"

    @property
    def _is_folder(self) -> bool:
        return Path(self.source).is_dir()

    def fetch(self) -> Path:
        """The path of the weights, which are downloaded if they are not in the cache.

        Raises:
            SourceError: the file could not be had, or has another digest.
        """
        if self._is_folder:
            path = Path(self.source) / self.filename
            _check_local(path, self.digest)
            return path
        try:
            return download_from_hub(
                self.source, self.filename, revision=self.revision, digest=self.digest
            )
        except SourceError as error:
            raise SourceError(f"{str(error).rstrip('.')}. {_REMEDY}") from error

    def fetch_folder(self) -> Path:
        """The folder with the weights and the small files beside them, such as the tokenizer.

        Raises:
            SourceError: a file could not be had, or the weights have another digest.
        """
        if self._is_folder:
            return self.fetch().parent
        from huggingface_hub import snapshot_download

        try:
            folder = snapshot_download(
                self.source, revision=self.revision, allow_patterns=["*.json", "*.txt"]
            )
        except Exception as error:  # its own, httpx's and the system's have no common base
            cause = find_root_cause(error)
            raise SourceError(f"could not download {self.source}: {cause}. {_REMEDY}") from error
        self.fetch()
        return Path(folder)


@dataclass(frozen=True, kw_only=True)
class Sam2Checkpoint(Checkpoint):
    """The weights of a SAM-2, and the YAML file that describes its architecture.

    Attributes:
        config: the path of the YAML file, or its name among those of the sam2 package.
    """

    config: str

    def find_config(self) -> Path:
        """The path of the YAML file.

        Raises:
            SourceError: there is no such file.
        """
        path = Path(self.config)
        if not path.is_absolute():
            path = Path(str(files("sam2"))) / "configs" / self.config
        if not path.is_file():
            raise SourceError(f"there is no SAM-2 configuration {path}")
        return path


@dataclass(frozen=True, kw_only=True)
class PresenceModel:
    """A logistic regression from evidence to presence; see `labkit.segment.presence`.

    Attributes:
        peak: weight of the logit of the peak.
        contrast: weight of the contrast.
        contrastive_margin: weight of the margin over the other sentences.
        agreement: weight of the agreement of masks and heat.
        constant: added to the weighted sum.
        threshold: presence from which a sentence counts as true of the image.
    """

    peak: float
    contrast: float
    contrastive_margin: float
    agreement: float
    constant: float
    threshold: float = 0.5


@dataclass(frozen=True, kw_only=True)
class Profile:
    """The weights that a segmenter runs on.

    Attributes:
        clipseg: the CLIPSeg.
        sam2: the SAM-2 checkpoints by size.
        default_sam2: the size that is used when none is asked for.
        presence: how evidence becomes a presence score.
        templates: texts with one `{}` into which each sentence is filled.
        note: stands on the face of every figure and report; "" for none.
    """

    clipseg: Checkpoint
    sam2: Mapping[str, Sam2Checkpoint]
    default_sam2: str
    presence: PresenceModel
    templates: tuple[str, ...]
    note: str = ""

    def get_sam2(self, size: str | None = None) -> Sam2Checkpoint:
        """The checkpoint of a size; None means the default one.

        Raises:
            InputError: there is no such size.
        """
        name = size or self.default_sam2
        if name not in self.sam2:
            raise InputError(f"sam2 must be one of {', '.join(self.sam2)}, got {name!r}")
        return self.sam2[name]


def _published_sam2(size: str, short: str, digest: str, revision: str = "main") -> Sam2Checkpoint:
    return Sam2Checkpoint(
        source=f"facebook/sam2.1-hiera-{size}",
        filename=f"sam2.1_hiera_{size.replace('-', '_')}.pt",
        config=f"sam2.1/sam2.1_hiera_{short}.yaml",
        revision=revision,
        digest=f"sha256:{digest}",
    )


_REMEDY = "Check the network and the source, or choose profile='demo', which needs neither."
_ASSETS = Path(str(files("labkit"))) / "assets"

_FULL = Profile(
    clipseg=Checkpoint(
        source="CIDAS/clipseg-rd64-refined",
        revision="999e0328d9e10b484360c477313983f9afdd7050",
        digest="sha256:d00ca85d6b859f9d07b7cfb8ef26fe9771cb275b34c9368f2ecf603139307f55",
    ),
    sam2={
        "tiny": _published_sam2(
            "tiny", "t", "7402e0d864fa82708a20fbd15bc84245c2f26dff0eb43a4b5b93452deb34be69"
        ),
        "small": _published_sam2(
            "small", "s", "6d1aa6f30de5c92224f8172114de081d104bbd23dd9dc5c58996f0cad5dc4d38"
        ),
        "base-plus": _published_sam2(
            "base-plus", "b+", "a2345aede8715ab1d5d31b4a509fb160c5a4af1970f199d9054ccfb746c004c5"
        ),
        "large": _published_sam2(
            "large",
            "l",
            "2647878d5dfa5098f2f8649825738a9345572bae2d4350a2468587ece47dd318",
            revision="665f8e2ad61cf5f53d65644ff27c8ee525124610",
        ),
    },
    default_sam2="large",
    # Not calibrated, since no annotated photographs were at hand: with agreement 0.6 and the ground
    # at 0, a probability of 0.3, at which CLIPSeg's authors cut, lies just above the threshold.
    presence=PresenceModel(
        peak=1.5, contrast=3.0, contrastive_margin=3.0, agreement=1.0, constant=-0.2
    ),
    templates=("a photo of a {}",),
)


def get_profile(name: str) -> Profile:
    """The profile "full", of the published weights, or "demo", of those that come with labkit.

    Raises:
        InputError: `name` is neither.
        SourceError: the files of "demo" are not all there.

    Example:
        >>> list(get_profile("full").sam2)
        ['tiny', 'small', 'base-plus', 'large']
    """
    if name == "full":
        return _FULL
    if name != "demo":
        raise InputError(f"profile must be 'full' or 'demo', got {name!r}")
    path = _ASSETS / "demo.json"
    if not path.is_file():
        raise SourceError(f"there is no {path}; install labkit anew, its assets are missing")
    facts = json.loads(path.read_text())
    return Profile(
        clipseg=Checkpoint(source=str(_ASSETS / "clipseg-tiny"), digest=facts["clipseg"]),
        sam2={
            "demo": Sam2Checkpoint(
                source=str(_ASSETS / "sam2-tiny"),
                filename="sam2.safetensors",
                config=str(_ASSETS / "sam2-tiny" / "sam2.yaml"),
                digest=facts["sam2"],
            )
        },
        default_sam2="demo",
        presence=PresenceModel(**facts["presence"]),
        templates=("{}", "a photo of a {}"),
        note="demo: tiny models trained on procedural scenes",
    )


def check_installed() -> None:
    """Make sure that the libraries which only segmentation needs are installed.

    Raises:
        SourceError: one is missing; the message says how to install it.
    """
    needed = ("transformers", "sam2", "hydra", "iopath", "cv2", "skimage", "pycocotools")
    missing = [name for name in needed if find_spec(name) is None]
    if missing:
        raise SourceError(
            f"segmentation needs {', '.join(missing)}: in a clone of labkit, "
            "pip install '.[segment]', then "
            "SAM2_BUILD_CUDA=0 pip install --no-build-isolation --no-deps sam2"
        )


def _check_local(path: Path, digest: str) -> None:
    if not path.is_file():
        raise SourceError(f"there is no {path}. {_REMEDY}")
    if digest and not has_digest(path, digest):
        raise SourceError(
            f"{path} has a wrong checksum (expected {digest}): it was altered or cut short. "
            "Put the original back, or install labkit anew."
        )
