"""Which weights each profile uses: a table of checkpoints, and how they are fetched and checked."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar

from labkit.files import download_from_hub, has_digest, parse_json
from labkit.runtime import InputError, SourceError, as_one_line, find_root_cause

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A file of weights, in a repository of the Hugging Face hub or in a folder.

    Attributes:
        source: the repository, "owner/name", or the path of a folder.
        filename: the file of the weights in it.
        revision: the commit of the repository, or "main".
        digest: expected checksum of the file, "sha256:..." in hex; "" means that nothing is
            checked, and `name` says so.
    """

    source: str
    filename: str = "model.safetensors"
    revision: str = "main"
    digest: str = ""
    remedy: ClassVar[str] = (
        "Check the network and the source, or choose profile='demo', which needs neither."
    )

    @property
    def name(self) -> str:
        """The source and its revision, for reports, and whether the file is not checked."""
        unchecked = "" if self.digest else "not checked"
        if self._is_folder:
            facts = ", ".join(filter(None, ["local", unchecked]))
            return f"{Path(self.source).resolve().name} ({facts})"
        return f"{self.source} at {self.revision[:12]}" + (f" ({unchecked})" if unchecked else "")

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
            _check_local(path, self.digest, self.remedy)
            return path
        try:
            return download_from_hub(
                self.source, self.filename, revision=self.revision, digest=self.digest or None
            )
        except SourceError as error:
            reason = self._explain_refusal(error) or str(error).rstrip(".")
            raise SourceError(f"{reason}. {self.remedy}") from error

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
            cause = f"could not download {self.source}: {find_root_cause(error)}"
            reason = self._explain_refusal(error) or cause
            raise SourceError(f"{reason}. {self.remedy}") from error
        self.fetch()
        return Path(folder)

    def _explain_refusal(self, error: BaseException) -> str:
        """Say that the hub refuses the repository, where `error` comes of that; "" elsewhere."""
        cause: BaseException | None = error
        while cause is not None:
            status = getattr(getattr(cause, "response", None), "status_code", None)
            if status in (401, 403):
                return (
                    f"the hub refuses {self.source} ({status}): it is gated, private or misspelt; "
                    "accept its licence on its page and log in with `hf auth login`"
                )
            cause = cause.__cause__
        return ""


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
class DetectorCheckpoint(Checkpoint):
    """The weights of a detector, as transformers writes them."""

    remedy: ClassVar[str] = "Check the network and the source, or choose detector='none'."


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

    def replace_weights(
        self,
        *,
        clipseg: str | Checkpoint | None = None,
        sam2: str | Sam2Checkpoint | None = None,
    ) -> Profile:
        """The profile with other weights.

        Args:
            clipseg: a CLIPSeg of your own, see `find_clipseg`; None keeps that of the profile. If
                its folder holds `presence.json`, the fields of a `PresenceModel`, that is taken
                too; otherwise `note` says that presence was not calibrated for it.
            sam2: one of the sizes of the profile, or a SAM-2 of your own, see `find_sam2`; None
                keeps the default one.

        Raises:
            InputError: `clipseg` or `sam2` is no checkpoint, or `presence.json` is damaged.

        Example:
            >>> assets = Path(str(files("labkit"))) / "assets"
            >>> own = get_profile("full").replace_weights(clipseg=f"{assets}/clipseg-tiny")
            >>> own.clipseg.name
            'clipseg-tiny (local, not checked)'
        """
        profile = self
        if isinstance(sam2, str) and sam2 in profile.sam2:
            profile = replace(profile, default_sam2=sam2)
        elif sam2 is not None:
            own = find_sam2(sam2, sizes=tuple(profile.sam2)) if isinstance(sam2, str) else sam2
            profile = replace(profile, sam2={"own": own}, default_sam2="own")
        if clipseg is not None:
            checkpoint = find_clipseg(clipseg) if isinstance(clipseg, str) else clipseg
            presence = _find_presence(checkpoint)
            note = "own weights" if presence else "own weights, presence not calibrated for them"
            presence = presence or profile.presence
            profile = replace(profile, clipseg=checkpoint, presence=presence, note=note)
        for source, checkpoint in ((clipseg, profile.clipseg), (sam2, profile.get_sam2())):
            if source is not None and not checkpoint.digest:
                _logger.info("%s: give a digest to have it checked", checkpoint.name)
        return profile


def _published_sam2(size: str, short: str, digest: str, revision: str = "main") -> Sam2Checkpoint:
    return Sam2Checkpoint(
        source=f"facebook/sam2.1-hiera-{size}",
        filename=f"sam2.1_hiera_{size.replace('-', '_')}.pt",
        config=f"sam2.1/sam2.1_hiera_{short}.yaml",
        revision=revision,
        digest=f"sha256:{digest}",
    )


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

DETECTORS: Mapping[str, DetectorCheckpoint] = {
    # No revision and no digest is known from several independent sources.
    "mm-grounding-dino": DetectorCheckpoint(
        source="openmmlab-community/mm_grounding_dino_tiny_o365v1_goldg_v3det"
    ),
    "owlv2": DetectorCheckpoint(
        source="google/owlv2-base-patch16-ensemble",
        revision="cfd3195ba4ea9592eec887ded089f4c08eff231d",
        digest="sha256:e1e130b9e404cf91a75ad45644c1da9d7fa5284085eecc864266a6923efb99e7",
    ),
}
"""The published detectors by name, both under the licence Apache-2.0."""


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
    return _load_demo()


def _load_demo() -> Profile:
    path = _ASSETS / "demo.json"
    if not path.is_file():
        raise SourceError(f"there is no {path}; install labkit anew, its assets are missing")
    facts = parse_json(path.read_bytes())
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


def find_clipseg(text: str) -> Checkpoint:
    """Find the CLIPSeg that `text` names.

    Args:
        text: SOURCE[@REVISION][#sha256:DIGEST]. The source is a folder with the files of
            transformers, `config.json`, `model.safetensors` and those of the tokenizer; or a
            repository of the Hugging Face hub, "owner/name".

    Raises:
        InputError: it is neither, or the folder is no checkpoint.

    Example:
        >>> find_clipseg("CIDAS/clipseg-rd16@main").name
        'CIDAS/clipseg-rd16 at main (not checked)'
    """
    if text == _FULL.clipseg.source:
        return _FULL.clipseg
    checkpoint = _parse_source("clipseg", text)
    folder = Path(checkpoint.source)
    if folder.is_dir():
        needed = ("config.json", checkpoint.filename)
        missing = [name for name in needed if not (folder / name).is_file()]
        if missing:
            raise InputError(f"clipseg: {folder} is no CLIPSeg, it lacks {' and '.join(missing)}")
    return checkpoint


def find_detector(text: str) -> DetectorCheckpoint:
    """Find the detector that `text` names.

    Args:
        text: one of the names in `DETECTORS`; or SOURCE[@REVISION][#sha256:DIGEST], where the
            source is a folder with the files of transformers, or a repository of the Hugging Face
            hub, "owner/name".

    Raises:
        InputError: it is none of these.

    Example:
        >>> find_detector("owlv2").name
        'google/owlv2-base-patch16-ensemble at cfd3195ba4ea'
    """
    if text in DETECTORS:
        return DETECTORS[text]
    checkpoint = _parse_source("detector", text, ("none", *DETECTORS))
    for published in DETECTORS.values():
        if text == published.source:
            return published
    return DetectorCheckpoint(
        source=checkpoint.source, revision=checkpoint.revision, digest=checkpoint.digest
    )


def find_sam2(text: str, *, sizes: Sequence[str] = ()) -> Sam2Checkpoint:
    """Find the SAM-2 that `text` names.

    Its architecture is described by a YAML file. One in a folder may call any code when it is
    loaded, so give only folders that you trust; one in a repository of the hub is never used.

    Args:
        text: SOURCE[@REVISION][#sha256:DIGEST]. The source is a file of weights, `.pt` or
            `.safetensors`; or a folder with one such file; or a repository of the Hugging Face
            hub, "owner/name", named like those of facebook. The architecture is that of the YAML
            file beside the weights, or else of a file name such as `sam2.1_hiera_tiny.pt`.
        sizes: names that are known too, for the message.

    Raises:
        InputError: it is none of these, the weights are not certain, or their architecture is
            not.

    Example:
        >>> find_sam2("facebook/sam2-hiera-tiny").config
        'sam2/sam2_hiera_t.yaml'
    """
    published = {checkpoint.source: checkpoint for checkpoint in _FULL.sam2.values()}
    if text in published:
        return published[text]
    checkpoint = _parse_source("sam2", text, sizes)
    folder, filename = Path(checkpoint.source), ""
    if folder.is_file():
        folder, filename = folder.parent, folder.name
    if not folder.is_dir():
        filename = f"{checkpoint.source.rpartition('/')[2].replace('-', '_')}.pt"
        filename = filename.replace("sam2_1", "sam2.1")
        configs = []
    else:
        names = sorted(path.name for path in folder.iterdir())
        weights = [name for name in names if name.endswith((".pt", ".safetensors"))]
        if not filename and len(weights) != 1:
            found = f"{len(weights)}: {', '.join(weights)}" if weights else "none"
            raise InputError(
                f"sam2: {folder} must hold one file of weights, .pt or .safetensors, got {found}"
            )
        filename = filename or weights[0]
        configs = [name for name in names if name.endswith((".yaml", ".yml"))]
    if len(configs) > 1:
        raise InputError(f"sam2: {folder} must hold one YAML file, got {', '.join(configs)}")
    config = str((folder / configs[0]).resolve()) if configs else _guess_config(filename)
    if not config:
        raise InputError(
            f"sam2: the architecture of {text} is unknown; put its YAML file beside the weights, "
            "or name them like sam2.1_hiera_tiny.pt"
        )
    source = str(folder) if folder.is_dir() else checkpoint.source
    return Sam2Checkpoint(
        source=source,
        filename=filename,
        revision=checkpoint.revision,
        digest=checkpoint.digest,
        config=config,
    )


def _guess_config(filename: str) -> str:
    """The name of the configuration of weights in the sam2 package; "" if it has none."""
    match = re.fullmatch(r"(sam2(?:\.1)?)_hiera_(\w+)\.(pt|safetensors)", filename)
    shorts = {"tiny": "t", "small": "s", "base_plus": "b+", "large": "l"}
    if not match or match[2] not in shorts:
        return ""
    return f"{match[1]}/{match[1]}_hiera_{shorts[match[2]]}.yaml"


def _parse_source(name: str, text: str, sizes: Sequence[str] = ()) -> Checkpoint:
    """Parse SOURCE[@REVISION][#DIGEST]; a path that exists is taken as it is."""
    source, _, digest = (text, "", "") if Path(text).exists() else text.partition("#")
    repository, _, revision = (source, "", "") if Path(source).exists() else source.partition("@")
    if digest and not re.fullmatch(r"sha256:[0-9a-fA-F]{64}", digest):
        raise InputError(f"{name}: a digest is sha256: and 64 hex digits, got {digest!r}")
    if Path(repository).exists() or re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", repository):
        return Checkpoint(source=repository, revision=revision or "main", digest=digest)
    kinds = "a folder or a repository of the hub, owner/name"
    if sizes:
        raise InputError(f"{name} must be one of {', '.join(sizes)}, got {text!r}; or give {kinds}")
    raise InputError(f"{name} must be {kinds}, got {text!r}")


def _find_presence(checkpoint: Checkpoint) -> PresenceModel | None:
    """The presence model beside the weights in a folder; None if there is none."""
    path = Path(checkpoint.source) / "presence.json"
    if not path.is_file():
        return None
    try:
        facts = parse_json(path.read_bytes())
        facts = facts.get("presence", facts)
        values = {each.name: float(facts[each.name]) for each in fields(PresenceModel)}
    except (AttributeError, KeyError, OSError, TypeError, ValueError) as error:
        names = ", ".join(each.name for each in fields(PresenceModel))
        raise InputError(
            f"{path} must hold numbers called {names}: {as_one_line(repr(error))}"
        ) from error
    return PresenceModel(**values)


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
            "SAM2_BUILD_CUDA=0 pip install --no-build-isolation --no-deps --require-hashes "
            "-r requirements-sam2.txt"
        )


def _check_local(path: Path, digest: str, remedy: str) -> None:
    if not path.is_file():
        raise SourceError(f"there is no {path}. {remedy}")
    if digest and not has_digest(path, digest):
        raise SourceError(
            f"{path} has a wrong checksum (expected {digest}): it was altered or cut short. "
            "Put the original back, or install labkit anew."
        )
