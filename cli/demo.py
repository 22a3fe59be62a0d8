"""``bnpatch demo``: the main job on real images, from nothing, in about a minute."""

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bnpatch.core.errors import BnpatchError
from bnpatch.core.io import atomic_path, check_writable, writing_to

from . import options as opt
from .console import say

if TYPE_CHECKING:
    import numpy.typing as npt

SIDE = 32  # side of the written images in pixels; those of the data set have 8
CONTRAST = 0.6


def demo(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for model, images and results.")
    ] = Path("bnpatch-demo"),
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training images.")] = 12,
    seed: opt.Seed = 0,
) -> None:
    """Train a small classifier, let the camera fog up, and tune alpha.

    The images are scikit-learn's handwritten digits. A small ResNet learns one half of them; the other
    half is written as a camera behind fogged glass would see it, with contrast x 0.6. Then the very
    command runs that you would use.
    """
    check_writable(output)
    images, labels = digits()
    half = len(images) // 2
    say(f"training a small ResNet on {half} handwritten digits (scikit-learn), {epochs} epochs")
    train_classifier(images[:half], labels[:half], epochs, seed, output / "model.pt")
    foggy = 127.5 + CONTRAST * (images[half:].astype(float) - 127.5)
    write_folders(foggy.round().astype("uint8"), labels[half:], output / "val")
    say(f"wrote {output / 'model.pt'}")
    say(f"wrote {len(foggy)} other digits, with contrast x {CONTRAST}, to {output / 'val'}/")
    say("\n$ bnpatch tune-alpha model.pt --data val/")
    command = [sys.executable, "-m", "bnpatch_cli", "tune-alpha", "model.pt", "--data", "val/"]
    command += ["--seed", str(seed)]
    code = subprocess.run(command, cwd=output, check=False).returncode
    if code == 0:
        say(f"\nthe report is in {output / 'bnpatch-out' / 'report.html'}")
    raise typer.Exit(code)


def digits() -> tuple["npt.NDArray[Any]", "npt.NDArray[Any]"]:
    """Return 1,797 digits as bytes (N, SIDE, SIDE), dark on light, and their classes; shuffled."""
    import numpy as np
    from PIL import Image

    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise BnpatchError(
            "the demo needs scikit-learn for its images", "pip install 'bnpatch[demo]'"
        ) from error
    bunch = load_digits()
    order = np.random.default_rng(0).permutation(len(bunch.target))
    small = (bunch.images[order] * (255 / 16)).round().astype(np.uint8)
    large = [
        np.asarray(Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.BICUBIC)) for image in small
    ]
    return 255 - np.stack(large), bunch.target[order]


def train_classifier(
    images: "npt.NDArray[Any]", labels: "npt.NDArray[Any]", epochs: int, seed: int, path: Path
) -> None:
    """Train timm's test_resnet with plain Batch Norm, and write it as timm's training script does."""
    import timm
    import torch
    import torch.nn.functional as F

    torch.manual_seed(seed)
    model = timm.create_model("test_resnet", num_classes=10, in_chans=1)
    x = torch.from_numpy(images)[:, None].float() / 127.5 - 1
    y = torch.from_numpy(labels)
    steps = epochs * (len(x) // 32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=steps)
    for _ in range(epochs):
        for batch in torch.randperm(len(x))[: len(x) // 32 * 32].view(-1, 32):
            loss = F.cross_entropy(model(x[batch]), y[batch])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    args = {"img_size": SIDE, "mean": [0.5], "std": [0.5], "crop_pct": 1.0, "interpolation": "bilinear"}
    content = {
        "arch": "test_resnet",
        "state_dict": model.state_dict(),
        "args": args,
        "class_names": [str(digit) for digit in range(10)],
    }
    with atomic_path(path) as temporary:
        torch.save(content, temporary)


def write_folders(images: "npt.NDArray[Any]", labels: "npt.NDArray[Any]", folder: Path) -> None:
    """Write images as PNG files in a folder per class."""
    from PIL import Image

    with writing_to(folder):
        for index, (image, label) in enumerate(zip(images, labels, strict=True)):
            path = folder / str(label) / f"{index:04d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
