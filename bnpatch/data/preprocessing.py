"""How an image becomes an input of a model: resize, crop and normalize, as the model was trained."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image
from torch import Tensor, nn

from bnpatch.core.errors import BnpatchError
from bnpatch.core.text import counted

_INTERPOLATIONS = ("bilinear", "bicubic", "nearest", "lanczos", "box", "hamming")
_VALUES = {"img_size", "input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode"}
_CROP_MODES = ("center", "squash", "border")
_LARGEST_SIDE = 1 << 16
_MOST_CHANNELS = 1 << 12  # more than any camera has

Transform = Callable[[Image.Image], npt.NDArray[np.uint8]]


@dataclass(frozen=True)
class Preprocessing:
    """The values by which an image becomes an input.

    The image is resized, cropped, scaled to [0, 1], shifted by the mean and divided by std.

    Attributes:
        input_size: (channels, height, width) of the input.
        mean: mean per channel, for values in [0, 1].
        std: standard deviation per channel, for values in [0, 1].
        interpolation: interpolation of the resize, by timm's names.
        crop_pct: side of the crop divided by the side that the image is resized to.
        crop_mode: timm's crop mode: center, squash or border.
        source: where these values come from, for people.
    """

    input_size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"
    crop_pct: float = 0.875
    crop_mode: str = "center"
    source: str = "given"

    def __post_init__(self) -> None:
        # JSON has lists, which equal no tuple.
        object.__setattr__(self, "input_size", tuple(self.input_size))
        channels = self.input_size[0]
        if channels > _MOST_CHANNELS:
            raise BnpatchError(f"an input of {channels} channels is no image", f"at most {_MOST_CHANNELS}")
        for name in ("mean", "std"):
            values = tuple(float(v) for v in getattr(self, name))
            if len(values) != channels:  # for example ImageNet's three for a grayscale model: average them
                values = (sum(values) / len(values),) * channels
            object.__setattr__(self, name, values)
        if not all(v > 0 for v in self.std):
            raise BnpatchError(f"std = {self.std} is not positive", "give --std as for images in [0, 1]")

    @classmethod
    def of_timm(
        cls, module: nn.Module, source: str, stored: Mapping[str, Any] | None = None
    ) -> "Preprocessing":
        """Return what timm resolves from a model's pretrained_cfg and from the values in a checkpoint."""
        from timm.data import resolve_model_data_config

        cfg = resolve_model_data_config(
            module, args={k: v for k, v in (stored or {}).items() if v is not None}
        )
        return cls(**cfg, source=source).checked()

    @classmethod
    def of_torchvision(cls, weights: Any, channels: int = 3) -> "Preprocessing":
        """Return the preprocessing of a member of a torchvision weights enum."""
        preset = weights.transforms()
        crop, resize = preset.crop_size[0], preset.resize_size[0]
        return cls(
            input_size=(channels, crop, crop),
            mean=tuple(preset.mean),
            std=tuple(preset.std),
            interpolation=preset.interpolation.value,
            # timm resizes to floor(crop / crop_pct). Adding 0.5 keeps rounding from changing the result.
            crop_pct=crop / (resize + 0.5),
            source=f"torchvision's {weights}",
        )

    def override(self, channels: int | None = None, **values: Any) -> "Preprocessing":
        """Return this preprocessing with other values, without those that are None.

        Args:
            channels: number of input channels.
            values: attributes by name, as in the data config of a timm model; or ``img_size``, the side of a
                square input in pixels, or its height and width.

        Raises:
            BnpatchError: there is no such value, the number of values does not fit the channels, or the
                interpolation is not known.
        """
        values = {name: value for name, value in values.items() if value is not None}
        if unknown := values.keys() - _VALUES:
            raise BnpatchError(
                f"preprocessing has no value {min(unknown)!r}", f"choose {', '.join(sorted(_VALUES))}"
            )
        if not values and channels in (None, self.input_size[0]):
            return self
        source = f"{self.source}, but {', '.join(values)} as asked" if values else self.source
        wanted = channels or self.input_size[0]
        for name in ("mean", "std"):
            if name in values and len(values[name]) not in (1, wanted):
                raise BnpatchError(
                    f"--{name} has {counted(len(values[name]), 'value')}, the model "
                    f"{counted(wanted, 'channel')}",
                    "give one, or one each",
                )
        if values.get("interpolation", "bilinear") not in _INTERPOLATIONS:
            raise BnpatchError(
                f"there is no interpolation {values['interpolation']!r}",
                f"choose {', '.join(_INTERPOLATIONS)}",
            )
        size = values.pop("img_size", tuple(values.pop("input_size", self.input_size))[1:])
        height, width = (size, size) if isinstance(size, int) else size
        size = (channels or self.input_size[0], height, width)
        return replace(self, **values, input_size=size, source=source)

    def for_inputs(self, shape: Sequence[int], whose: str) -> "Preprocessing":
        """Return this preprocessing with the size of floating-point inputs, which are not resized.

        Args:
            shape: shape of an input; only (C, H, W) with the channels of this preprocessing counts.
            whose: what has inputs of this size, for :attr:`source`.
        """
        size = tuple(shape)
        if size == self.input_size or len(size) != 3 or size[0] != self.input_size[0]:
            return self
        return replace(self, input_size=size, source=f"{self.source}, but the size of {whose}")

    @property
    def image_mode(self) -> str:
        """The mode that PIL converts images to: L for one channel, RGB for three.

        Raises:
            BnpatchError: the model takes another number of channels.
        """
        modes = {1: "L", 3: "RGB"}
        if self.input_size[0] not in modes:
            raise BnpatchError(
                f"the model takes {self.input_size[0]} channels, image files give 1 or 3",
                "give the inputs as float arrays in an .npz file",
            )
        return modes[self.input_size[0]]

    def transform(self) -> Transform:
        """Make the transform from a PIL image to a uint8 array (channels, height, width).

        It resizes and crops, which is done once per image. The model normalizes each batch on its device.
        """
        from timm.data import create_transform

        made: Transform = create_transform(
            input_size=self.input_size,
            is_training=False,
            interpolation=self.interpolation,
            crop_pct=self.crop_pct,
            crop_mode=self.crop_mode,
            use_prefetcher=True,  # makes the transform return bytes, which need a quarter of the memory
        )
        return made

    def __str__(self) -> str:
        _, height, width = self.input_size
        resized = math.floor(min(height, width) / self.crop_pct)
        numbers = "; ".join(
            f"{name} {', '.join(f'{v:.3g}' for v in getattr(self, name))}" for name in ("mean", "std")
        )
        return f"{width} x {height} out of {resized} ({self.interpolation}, {self.crop_mode}); {numbers}"

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values, for a checkpoint or a recipe."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any], where: str) -> "Preprocessing":
        """Read what :meth:`to_json` made; ``where`` says where it was stored, for :attr:`source`.

        Raises:
            BnpatchError, AttributeError, IndexError, TypeError, ValueError: another program wrote the values.
        """
        plain: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        first = str(values.get("source", "unknown origin")).rsplit(", as of ", 1)[-1]
        return cls(**{**plain, "source": f"{where}, as of {first}"}).checked()

    def checked(self) -> "Preprocessing":
        """Return this preprocessing; raise ValueError if a file gave it a value of another kind."""
        fits = {
            "input_size": len(self.input_size) == 3
            and all(isinstance(n, int) and 0 < n <= _LARGEST_SIDE for n in self.input_size),
            "mean": all(map(math.isfinite, self.mean)),
            "std": all(map(math.isfinite, self.std)),
            "interpolation": self.interpolation in _INTERPOLATIONS,
            "crop_pct": isinstance(self.crop_pct, (int, float)) and 0 < self.crop_pct < math.inf,
            "crop_mode": self.crop_mode in _CROP_MODES,
        }
        if wrong := [name for name, fit in fits.items() if not fit]:
            raise ValueError(f"{wrong[0]} is {str(getattr(self, wrong[0]))[:40]}")
        return self


class ImageModel(Protocol):
    """The attributes of a model that are needed to read a data set for it."""

    name: str
    class_names: tuple[str, ...] | None
    class_order: str
    preprocessing: Preprocessing

    def num_outputs(self, example: Tensor | None = None, classes: int | None = None) -> int:
        """Return K, the number of classes; ``classes`` is the number that the data has, if it is known."""
