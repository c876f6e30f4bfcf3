"""What every model has: a configuration, example inputs, and weights that save and load."""

import os
from abc import abstractmethod
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

import torch
from huggingface_hub import PyTorchModelHubMixin, constants
from safetensors.torch import load_model
from torch import Tensor, nn


class Model(nn.Module, PyTorchModelHubMixin, library_name="lamina", license="mit"):
    """The base of all models: an `nn.Module` with a frozen `config` that saves to and loads from a folder.

    A folder holds `config.json` and `model.safetensors`; a local one needs no network.

    Args:
        config: the family's frozen dataclass.

    Shape:
        - input and output: as the model says; `example_inputs` gives an input

    Source:
        The folder is that of `huggingface_hub.PyTorchModelHubMixin`.

    Example:
        >>> from lamina.models import create_model
        >>> model = create_model("vit_digits")
        >>> isinstance(model, Model), model.config.num_classes
        (True, 10)
    """

    config: Any

    @abstractmethod
    def example_inputs(
        self, batch_size: int = 1, device: torch.device | str | None = None
    ) -> tuple[Tensor, ...]:
        """Random inputs of the configured size, for a look at shapes and costs."""

    def num_parameters(self, *, trainable_only: bool = False) -> int:
        """How many numbers the parameters hold, shared ones once."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad or not trainable_only)

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> str | None:
        """Writes `config.json`, `model.safetensors` and a model card into `save_directory`.

        They are written beside and renamed, so that a full disk or a kill leaves what was there before.

        Args:
            save_directory: made where it does not exist.
            **options: those of `PyTorchModelHubMixin.save_pretrained`, e.g. `push_to_hub`.
        """
        folder = Path(save_directory)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as beside:
            answer: str | None = super().save_pretrained(beside, **options)
            folder.mkdir(exist_ok=True)
            for file in sorted(Path(beside).iterdir()):
                os.replace(file, folder / file.name)
        return answer

    @classmethod
    def from_published(cls, path: str | Path, **overrides: Any) -> Self:
        """A model with weights as their authors, or the library that people use, have published them.

        Args:
            path: a file or a folder on this machine, as `lamina.models.checkpoints` describes for the family.
            **overrides: fields of the configuration that the file does not decide, such as `dropout`.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: no published format of the family is known, or the file does not fit: every name that
                is left over is told.
        """
        name = f"{__package__}.checkpoints.{cls.__module__.rpartition('.')[2]}"
        if find_spec(name) is None:
            raise ValueError(f"no published format of {cls.__name__} is known")
        loaded: Self = import_module(name).load(cls, path, **overrides)
        return loaded

    @classmethod
    def _from_pretrained(cls, *, model_id: str, **options: Any) -> Any:
        """As the mixin's, which prints; a local folder needs nothing of it but this."""
        if not Path(model_id).is_dir():
            return super()._from_pretrained(model_id=model_id, **options)
        weights = Path(model_id) / constants.SAFETENSORS_SINGLE_FILE
        if not weights.is_file():
            raise FileNotFoundError(f"the folder {model_id} holds no {weights.name}")
        hub = ("revision", "cache_dir", "force_download", "local_files_only", "token")
        own = ("map_location", "strict")
        model = cls(**{name: value for name, value in options.items() if name not in (*hub, *own)})
        load_model(
            model, weights, strict=options.get("strict", True), device=options.get("map_location", "cpu")
        )
        return model
