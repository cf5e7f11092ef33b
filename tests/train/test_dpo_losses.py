"""Every loss of the DPO family against TRL's `DPOTrainer`, whose own code is given the same log-probs."""

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from trl import DPOTrainer

from qalign.losses.preference import PreferenceLoss

PAIRS, LONGEST = 7, 9
SMOOTHED = {"label_smoothing": 0.2}
OF_MARGINS = ("sigmoid", "ipo", "hinge", "sigmoid_norm", "discopop")
DIVERGENCES = {"forward_kl": "forward_kl", "js": "js_divergence", "alpha": "alpha_divergence"}


def theirs(weights, policy, reference, lengths, *, beta, label_smoothing=0.0, divergence=None, alpha=0.5, tau=0.05):
    """The loss of a batch by TRL. Its model gives every token of an answer one log-prob; prompts have one token."""
    answers = torch.arange(LONGEST) < lengths.T.reshape(-1, 1)  # all chosen, then all rejected
    of_tokens = answers * (policy / lengths).T.reshape(-1, 1)
    mask = torch.cat([torch.zeros(2 * PAIRS, 1), answers], dim=1).long()
    one = torch.ones(2 * PAIRS, LONGEST)
    outputs = SimpleNamespace(log_probs=of_tokens, entropy=one, mean_logits=one, is_top1=one.bool())
    same = SimpleNamespace(gather=lambda found: found, gather_for_metrics=lambda found: found, device="cpu")
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True), accelerator=same, aux_loss_enabled=False, ld_alpha=None,
        precompute_ref_logps=True, f_divergence_type=divergence or "reverse_kl", f_alpha_divergence_coef=alpha,
        loss_types=[*weights], loss_weights=[*weights.values()], beta=beta, label_smoothing=label_smoothing,
        args=SimpleNamespace(discopop_tau=tau), use_weighting=False, _total_train_tokens=0, _tp_size=1,
        _metrics={"train": defaultdict(list)},
    )  # fmt: skip
    inputs = {"input_ids": mask, "attention_mask": torch.ones_like(mask), "completion_mask": mask}
    inputs |= {"ref_chosen_logps": reference[:, 0], "ref_rejected_logps": reference[:, 1]}
    return DPOTrainer._compute_loss(trainer, lambda **_: outputs, inputs, False)


@pytest.mark.parametrize("beta", [0.1, 1.3])
@pytest.mark.parametrize(
    ("weights", "settings", "of_trl"),
    [
        *(({name: 1.0}, {}, {}) for name in (*OF_MARGINS, "bco_pair", "nca_pair", "sppo_hard", "apo_zero", "apo_down")),
        *(({name: 1.0}, SMOOTHED, SMOOTHED) for name in ("robust", "exo_pair", "aot", "aot_unpaired")),
        ({"exo_pair": 1.0}, {"label_smoothing": 1e-3}, {"label_smoothing": 1e-3}),
        ({"discopop": 1.0}, {"discopop_tau": 0.7}, {"tau": 0.7}),
        *(({name: 1.0}, SMOOTHED | {"divergence": ours}, SMOOTHED | {"divergence": others})
          for name in ("robust", "exo_pair") for ours, others in DIVERGENCES.items()),
        *(({name: 1.0}, {"divergence": ours}, {"divergence": others})
          for name in OF_MARGINS for ours, others in DIVERGENCES.items()),
        *(({"sigmoid": 1.0}, {"divergence": "alpha", "divergence_alpha": alpha},
           {"divergence": "alpha_divergence", "alpha": alpha}) for alpha in (0.0, 0.2, 1.0)),
        ({"sigmoid": 0.8, "bco_pair": 0.2, "aot": 0.3, "ipo": 2.0}, {}, {}),
    ],
)  # fmt: skip
def test_loss_and_gradient_equal_trl(weights, settings, of_trl, beta):
    torch.manual_seed(2)
    policy, reference = -torch.rand(2, PAIRS, 2) * 4 - 1
    lengths = torch.randint(2, LONGEST + 1, (PAIRS, 2))
    found = []
    for loss in (
        lambda leaf: PreferenceLoss(weights, beta, **settings)(leaf, reference, lengths).mean(),
        lambda leaf: theirs(weights, leaf, reference, lengths, beta=beta, **of_trl),
    ):
        leaf = policy.clone().requires_grad_()
        value = loss(leaf)
        value.backward()
        found.append((value.detach(), leaf.grad))
    (ours, gradient), (other, of_other) = found
    torch.testing.assert_close(ours, other, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, of_other, rtol=1e-5, atol=1e-6)
    assert gradient.norm() > 1e-3
