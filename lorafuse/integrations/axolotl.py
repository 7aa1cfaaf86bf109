"""`LorafusePlugin` for Axolotl, by two lines of its YAML:

    plugins:
      - lorafuse.integrations.axolotl.LorafusePlugin

Axolotl has LoRA kernels of its own and switches them on for LoRA and QLoRA where the YAML does not mention them. They
read the weights of the adapted layers and never call these, so that lorafuse would not run: the plugin switches them
off, and a YAML that switches them on is refused.
"""

from typing import Any

from lorafuse.errors import MissingDependency
from lorafuse.integrations.callback import LorafuseCallback

try:
    from axolotl.integrations.base import BasePlugin
    from pydantic import BaseModel
except ImportError as error:
    raise MissingDependency(
        "LorafusePlugin is for Axolotl, which is not installed here: pip install axolotl"
    ) from error

__all__ = ["KERNELS", "LorafuseArgs", "LorafusePlugin"]

# Axolotl's kernels over linear layers; the one over embeddings (lora_embedding_kernel) reads no layer of lorafuse's
KERNELS = ("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel")


class LorafuseArgs(BaseModel):
    """The plugin's own keys of the YAML, as `lorafuse.patch` has them."""

    lorafuse_backend: str = "auto"
    lorafuse_strict: bool = False
    lorafuse_groups: bool = True
    lorafuse_dropout_rng: str = "philox"
    lorafuse_numerics: str = "fused"


class LorafusePlugin(BasePlugin):
    """Trains an adapter of Axolotl through `LorafuseCallback`, without Axolotl's own LoRA kernels."""

    def register(self, cfg: Any) -> None:
        """Raises ValueError when the YAML switches kernels on that exclude lorafuse."""
        requested = [
            name for name in (*KERNELS, "unsloth_lora_mlp", "unsloth_lora_qkv", "unsloth_lora_o") if cfg.get(name)
        ]
        if requested:
            raise ValueError(
                f"{', '.join(requested)} and lorafuse exclude each other: these kernels read the adapted layers' "
                "weights and never call the layers; set them to false, or remove lorafuse from plugins"
            )
        # what is set is not switched on by Axolotl
        for name in KERNELS:
            cfg[name] = False

    def get_input_args(self) -> str:
        return "lorafuse.integrations.axolotl.LorafuseArgs"

    def add_callbacks_pre_trainer(self, cfg: Any, model: Any) -> list[LorafuseCallback]:
        """The callback that patches at the end of the trainer's constructor, for SFT and RL alike."""
        given = LorafuseArgs(**{name: cfg[name] for name in LorafuseArgs.model_fields if cfg.get(name) is not None})
        options = {name.removeprefix("lorafuse_"): value for name, value in given.model_dump().items()}
        return [LorafuseCallback(**options)]
