"""Feature extractors, loaded without running code: torch-fidelity's, or a TorchScript file."""

import hashlib
import os
import warnings
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from model import exact_float32

INCEPTION = "inception-v3-compat"  # the TF graph of 2015-12-05 that FID and IS are defined with
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"


class Extractor(nn.Module):
    """uint8 [B, C, H, W] -> features [B, D] and, where it tells classes, logits [B, K] or None.

    Gray is repeated to three channels, alpha is dropped. It runs in float32 throughout.

    Args:
        net: uint8 [B, 3, H, W] -> features, or a tuple of features and logits.
        name, digest: written beside every number; the digest is the weights' SHA-256.
        resizes: it brings images to a square of its own size.
    """

    def __init__(self, net: nn.Module, name: str, digest: str, *, resizes: bool = False):
        super().__init__()
        self.net, self.name, self.digest, self.resizes = net.eval(), name, digest, resizes

    @property
    def is_literature(self) -> bool:
        """True for the weights that published FIDs and ISs are computed with."""
        return self.name == INCEPTION and self.digest == INCEPTION_SHA256

    @torch.inference_mode()
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        images = images[:, :1].expand(-1, 3, -1, -1) if images.shape[1] < 3 else images
        with exact_float32():
            out = self.net(images[:, :3].contiguous())
        features, logits, *_ = (*out, None) if isinstance(out, tuple) else (out, None)
        if features.ndim != 2 or len(features) != len(images):
            shapes = f"{list(features.shape)} for {len(images)} images"
            raise ValueError(f"extractor {self.name}: features are {shapes}; they must be [B, D]")
        return features, logits

    def __str__(self) -> str:
        return f"{self.name} (sha256 {self.digest[:16]})"


def load_extractor(name: str = INCEPTION, weights: Path | None = None) -> Extractor:
    """Load an extractor that torch-fidelity has registered, or a TorchScript file, on the CPU.

    Inception's weights are downloaded where the network allows, and checked against their digest.

    Args:
        weights: a file in torch-fidelity's own format, instead of what it would download.

    Raises:
        ValueError: an unknown name, no torch-fidelity, or a file that does not hold weights.
        FileNotFoundError: a file is missing and cannot be downloaded.
    """
    try:
        import torch_fidelity.registry as registry
    except ImportError:
        wrong = "FID, IS, KID and precision/recall need torch-fidelity: pip install torch-fidelity"
        raise ValueError(wrong) from None
    if name not in registry.FEATURE_EXTRACTORS_REGISTRY:
        if weights:
            raise ValueError(f"extractor {name!r} is a file and holds its own weights")
        return _load_torchscript(Path(name), registry.FEATURE_EXTRACTORS_REGISTRY)
    if name.startswith("dinov2"):
        wrong = "downloads code and runs it when it is loaded; give a TorchScript file of it"
        raise ValueError(f"extractor {name} {wrong}")
    weights = weights or (_download_inception() if name == INCEPTION else None)
    if weights and not weights.is_file():
        raise FileNotFoundError(f"no extractor weights at {weights}")
    from torch_fidelity.utils import create_feature_extractor

    kind = registry.FEATURE_EXTRACTORS_REGISTRY[name]
    features, logits = (kind.get_default_feature_layer_for_metric(m) for m in ("fid", "isc"))
    layers = [features] if features == logits else [features, logits]  # one layer: no classes
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"  # the library would unpickle anything
    try:
        net = create_feature_extractor(
            name, layers, cuda=False, verbose=False,
            feature_extractor_weights_path=str(weights) if weights else None,
        )  # fmt: skip
    except OSError as error:
        raise FileNotFoundError(f"extractor {name} cannot be downloaded ({error})") from None
    except Exception as error:  # a file that holds no weights can raise anything
        reason = str(error).splitlines()[0]
        raise ValueError(f"{weights or name} does not hold weights of {name}: {reason}") from None
    state = ((key, tensor.contiguous().numpy()) for key, tensor in net.state_dict().items())
    content = [weights.read_bytes()] if weights else [k.encode() + v.tobytes() for k, v in state]
    # torch-fidelity's do
    return Extractor(net, name, hashlib.sha256(b"".join(content)).hexdigest(), resizes=True)


def _load_torchscript(path: Path, known: Iterable[str]) -> Extractor:
    if not path.is_file():
        names = ", ".join(name for name in known if "dino" not in name)
        raise ValueError(f"extractor {str(path)!r} is no TorchScript file, nor one of: {names}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that TorchScript is old
            net = torch.jit.load(path, map_location="cpu")  # builds no Python objects
    except Exception as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{path} is not a TorchScript file: {reason}") from None
    return Extractor(net, path.name, hashlib.sha256(path.read_bytes()).hexdigest())


def _download_inception() -> Path:
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3 as url

    path = Path(torch.hub.get_dir(), "checkpoints", url.rsplit("/", 1)[1])
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path), INCEPTION_SHA256, progress=False)
        except (OSError, RuntimeError) as error:
            wrong = f"Inception's weights cannot be downloaded ({error})"
            advice = f"bring {url} here and name it by --extractor-weights, or put it at {path}"
            raise FileNotFoundError(f"{wrong}; {advice}") from None
    return path
