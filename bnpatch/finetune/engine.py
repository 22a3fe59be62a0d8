"""Training steps: model, optimizer, schedule and averaged weights, on the devices of accelerate."""

import copy
import math
import random
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from bnpatch.core.errors import BnpatchError
from bnpatch.finetune.config import FineTuneSettings
from bnpatch.finetune.norm_decay import decay_norms, parameter_groups
from bnpatch.models.torch_model import TorchModel
from bnpatch.search.distributed import connecting


class Engine:
    """Takes optimizer steps, and can save and restore its state.

    Args:
        model: the model; its module is trained in place, on accelerate's device.
        settings: settings of the run.
        updates_per_epoch: optimizer steps per epoch, for the schedule.
        accelerator: from :func:`new_accelerator`.

    Raises:
        BnpatchError: timm doesn't have the optimizer or the schedule.
    """

    def __init__(
        self, model: TorchModel, settings: FineTuneSettings, updates_per_epoch: int, accelerator: Any
    ) -> None:
        from timm.data import Mixup
        from timm.utils import ModelEmaV3

        self.settings, self.accelerator, self.module = settings, accelerator, model.module
        self.model = model
        augmentation = settings.augmentation
        self.mixup = None
        if augmentation.mixup or augmentation.cutmix:
            self.mixup = Mixup(
                augmentation.mixup,
                augmentation.cutmix,
                label_smoothing=settings.smoothing,
                num_classes=model.num_outputs(),
            )
        self.ema = ModelEmaV3(model.module, settings.ema, use_warmup=True) if settings.ema else None
        self.optimizer = _optimizer(model.module, settings)
        self.schedule = _schedule(self.optimizer, settings, updates_per_epoch)
        if accelerator.num_processes > 1:
            # DDP waits for all gradients unless told that some may be missing; all processes must agree.
            unused = _any_process(may_leave_out_parameters(model))
            accelerator.ddp_handler.find_unused_parameters = unused
        self._wrapped, self._stepper = accelerator.prepare(model.module, self.optimizer)

    @property
    def device(self) -> torch.device:
        """The device of this process."""
        device: torch.device = self.accelerator.device
        return device

    @property
    def lr(self) -> float:
        """The learning rate of the last step."""
        return float(self.optimizer.param_groups[0]["lr"])

    @property
    def scored(self) -> nn.Module:
        """The module to evaluate and to keep: the one with averaged weights, if there is one."""
        averaged: nn.Module | None = self.ema.module if self.ema is not None else None
        return self.module if averaged is None else averaged

    def train(self) -> None:
        """Set the module to training mode."""
        self._wrapped.train()

    def add_gradient(self, x: Tensor, targets: Tensor, parts: int, is_last: bool) -> Tensor:
        """Add the gradient of a batch, which is one of ``parts`` batches of a step.

        Returns:
            The mean loss of the batch, without a gradient.

        Raises:
            BnpatchError: the batch has one example, and a norm has one value per channel to normalize.
        """
        x, targets = (t.to(self.device, non_blocking=True) for t in (x, targets))
        smoothing = self.settings.smoothing
        if self.mixup is not None and len(x) % 2 == 0:  # an unreadable image leaves an odd number
            x, targets = self.mixup(x, targets)
            smoothing = 0.0  # mixup has smoothed the labels already
        # Processes wait for each other once per step, not once per batch.
        with nullcontext() if is_last else self.accelerator.no_sync(self._wrapped):
            with self.accelerator.autocast():
                outputs = self.model.classes_of(self._forward(x))
            loss = F.cross_entropy(outputs.float(), targets, label_smoothing=smoothing)
            self.accelerator.backward(loss / parts)
        return loss.detach()

    def _forward(self, x: Tensor) -> Any:
        try:
            return self._wrapped(x)
        except ValueError as error:
            has_one_value = len(x) == 1 and any(
                math.prod(shape) == 1 for shape in self.model.norm_shapes().values()
            )
            if not has_one_value:
                raise
            raise BnpatchError(
                "a batch has one example only (the others can't be read, perhaps), and a norm can't train on "
                "one value per channel",
                "raise --batch-size, and remove images that can't be read",
            ) from error

    def step(self, update: int) -> None:
        """Take an optimizer step; ``update`` is its number in the whole run."""
        if self.settings.clip_grad is not None:
            self.accelerator.clip_grad_norm_(self._wrapped.parameters(), self.settings.clip_grad)
        self.schedule.step_update(update)
        self._stepper.step()
        self.drop_gradient()
        if self.ema is not None:
            self.ema.update(self.module, step=update)

    def drop_gradient(self) -> None:
        """Set the gradient to zero."""
        self._stepper.zero_grad()

    def total(self, values: Tensor) -> Tensor:
        """Sum values over all processes."""
        summed: Tensor = self.accelerator.reduce(values)
        return summed

    def state(self) -> dict[str, Any]:
        """Copy everything that steps change."""
        scaler = self.accelerator.scaler
        return {
            "model": copied(self.module.state_dict()),
            "ema": copied(self.ema.module.state_dict()) if self.ema is not None else None,
            "optimizer": copied(self.optimizer.state_dict()),
            "scaler": scaler.state_dict() if scaler is not None else None,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Restore a :meth:`state`."""
        self.module.load_state_dict(state["model"])
        self.optimizer.load_state_dict(copied(state["optimizer"]))
        if self.ema is not None:
            self.ema.module.load_state_dict(state["ema"])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.drop_gradient()

    def release(self) -> nn.Module:
        """Return the module without accelerate's wrappers."""
        module: nn.Module = self.accelerator.unwrap_model(self._wrapped, keep_fp32_wrapper=False)
        return module


def new_accelerator(settings: FineTuneSettings, device: torch.device) -> Any:
    """Make an ``accelerate.Accelerator``, which finds other processes of ``accelerate launch``.

    Raises:
        BnpatchError: accelerate isn't installed, the device doesn't support the precision, or there are other
            processes that can't be reached.
    """
    if settings.precision == "fp16" and device.type == "cpu":  # accelerate would continue in float32
        raise BnpatchError("a CPU does not train in fp16", "choose --precision bf16 or no")
    try:
        from accelerate import Accelerator, PartialState
        from accelerate.state import AcceleratorState
        from accelerate.utils import DistributedDataParallelKwargs
    except ImportError as error:
        raise BnpatchError("fine-tuning needs accelerate", "pip install 'bnpatch[fine-tune]'") from error
    with connecting():
        processes = PartialState(cpu=True if device.type == "cpu" else None)
    if processes.num_processes == 1:
        # accelerate keeps device and precision until the process ends, but runs may differ in both.
        AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(
        cpu=device.type == "cpu",
        mixed_precision=settings.precision,
        # Each process has running statistics of its own examples; merge_processes pools them.
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )


def copied(value: Any) -> Any:
    """Copy a nested value that training would change, with its tensors on the CPU."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {key: copied(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(copied(item) for item in value)
    return value


def _any_process(answer: bool) -> bool:
    from accelerate.utils import gather_object

    return any(gather_object([answer]))


def may_leave_out_parameters(model: TorchModel) -> bool:
    """Tell whether some parameters may get no gradient, in all steps or in some.

    In all steps, these are parameters that the loss does not depend on, such as those of another classifier.
    In some steps, they are parameters that code skips, depending on a random number or the value of a tensor.
    One step can't show what other steps skip, so any code that makes such a decision counts.

    In doubt the answer is yes. It costs a traversal of the graph in each step and a warning of torch, whereas
    a wrong no ends the training with an error.
    """
    before = _host_generators()  # changing them is harmless: each epoch seeds them again
    try:
        module = copy.deepcopy(model.module).train()  # running it may change it
        x = torch.zeros(2, *model.preprocessing.input_size, device=model.device)
        model.output_for(x)  # here, because it looks at values
        with _Decisions() as decisions:
            outputs = model.classes_of(module(x))
        parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        gradients = torch.autograd.grad(outputs.sum(), parameters, allow_unused=True)
    except Exception:  # e.g. it can't be copied, or needs another batch; training reports errors
        return True
    return (
        decisions.possible or _host_generators() != before or any(gradient is None for gradient in gradients)
    )


class _Decisions(TorchDispatchMode):
    """Records whether code reads the value of a tensor, which may decide what it computes."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.possible = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.possible |= torch.Tag.data_dependent_output in func.tags
        return func(*args, **(kwargs or {}))


def _host_generators() -> tuple[Any, ...]:
    """Return the states of the random generators of Python and NumPy, whose numbers are not tensors."""
    of_numpy: Any = np.random.get_state()
    return random.getstate(), of_numpy[1].tobytes(), *of_numpy[2:]


def _optimizer(module: nn.Module, settings: FineTuneSettings) -> torch.optim.Optimizer:
    from timm.optim import create_optimizer_v2

    groups = parameter_groups(module, settings.weight_decay, settings.norm_decay)
    try:
        optimizer: torch.optim.Optimizer = create_optimizer_v2(
            groups, settings.optimizer, lr=settings.lr, momentum=settings.momentum
        )
    except (ValueError, KeyError, AssertionError) as error:  # versions of timm differ in what they raise
        raise BnpatchError(
            f"timm has no optimizer {settings.optimizer!r}", "see timm.optim.list_optimizers()"
        ) from error
    decay_norms(optimizer)
    return optimizer


def _schedule(optimizer: torch.optim.Optimizer, settings: FineTuneSettings, updates_per_epoch: int) -> Any:
    from timm.scheduler import create_scheduler_v2

    try:
        schedule, _ = create_scheduler_v2(
            optimizer,
            settings.schedule,
            num_epochs=settings.epochs,
            decay_epochs=max(1, settings.epochs // 3),
            warmup_epochs=settings.warmup_epochs,
            warmup_prefix=True,
            step_on_epochs=False,
            updates_per_epoch=updates_per_epoch,
        )
    except ValueError:  # the name is unknown
        schedule = None  # as some versions of timm return for a name that they don't know
    if schedule is None:
        raise BnpatchError(f"timm has no schedule {settings.schedule!r}", "choose cosine, tanh, step or poly")
    return schedule
