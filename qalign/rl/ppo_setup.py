"""What PPO's loop is set up with: a model without randomness, its optimiser, and the account of its memory."""

import math
from collections.abc import Callable

import torch
from torch import nn
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.modeling_layers import GradientCheckpointingLayer

from qalign.config.recipe import PPO
from qalign.errors import UserError
from qalign.model.base import Base, Role


def prepare(base: Base, checkpointed_layers: int) -> None:
    """No dropout: log-probs of the policy that learns must be those of the policy that sampled ("The N+ Implementation
    Details of RLHF with PPO", Huang et al. 2024, arXiv:2403.17031). Checkpointing for the first so many layers."""
    for module in base.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    if checkpointed_layers:
        base.lm.activation_checkpointing_enable({"use_reentrant": False})
        layers = [module for module in base.lm.modules() if isinstance(module, GradientCheckpointingLayer)]
        for number, layer in enumerate(layers):
            layer.gradient_checkpointing = number < checkpointed_layers


def optimiser_of(settings: PPO, weights: list[nn.Parameter], iterations: int):
    """The optimiser, with `trainer:` having the last word.

    Adam's epsilon is 1e-5, not 1e-8 ("The N Implementation Details of RLHF with PPO", Huang et al. 2023).

    Returns:
        (the optimiser, the learning rate by iteration counted from 1, the norm at which gradients are clipped: as in
        transformers, `max_grad_norm: 0` is none).

    Raises:
        UserError: a value under `trainer:` that transformers refuses.
    """
    values = {
        "output_dir": "unused",
        "report_to": "none",
        "learning_rate": settings.learning_rate,
        "adam_epsilon": 1e-5,
        "use_cpu": not torch.cuda.is_available(),
    }
    try:
        args = TrainingArguments(**values | settings.trainer)
        make, options = Trainer.get_optimizer_cls_and_kwargs(args)
        optimizer = make(weights, **options | {"weight_decay": args.weight_decay})
        schedule = get_scheduler(
            settings.scheduler,
            optimizer,
            num_warmup_steps=math.ceil(settings.warmup_ratio * iterations),
            num_training_steps=iterations + 1,
            scheduler_specific_kwargs=args.lr_scheduler_kwargs,
        )
    except (TypeError, ValueError, ImportError) as error:
        raise UserError(f"ppo.trainer: {' '.join(str(error).split())}") from None
    (share,) = schedule.lr_lambdas
    rate: Callable[[int], float] = lambda iteration: settings.learning_rate * share(iteration)  # noqa: E731
    return optimizer, rate, args.max_grad_norm or math.inf


def bytes_by_role(base: Base, optimizer) -> dict[str, dict[str, int]]:
    """What each role holds: `weights`, `gradients` (while an update runs) and `optimiser`, in bytes."""
    size = lambda tensors: sum(tensor.nbytes for tensor in tensors)  # noqa: E731
    found = {Role.BASE: {"weights": base.held_bytes}}
    for role in base.adapters:
        held = base.trained_weights(role).values()
        trained = [weight for weight in held if weight.requires_grad]
        notes = [t for w in trained for t in optimizer.state.get(w, {}).values() if torch.is_tensor(t)]
        found[role] = {"weights": size(held), "gradients": size(trained), "optimiser": size(notes)}
    return found
