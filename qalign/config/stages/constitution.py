"""The section of constitutional AI: data made from principles instead of labels."""

from collections.abc import Iterator

from pydantic import Field

from qalign.config.stages.section import MAX_TOKENS, Data, Positive, Rows, Section


class Constitution(Section):
    """Constitutional AI: the model criticises and revises its own answers, and judges pairs of them, by principles in
    words (Bai et al. 2022, arXiv:2212.08073). Its files are data for the other stages: `sft.data: constitution` names
    its revisions, `dpo.data: constitution` (and reward, kto) its pairs."""

    data: Data
    """Prompts: harmful and ordinary ones, from rows of any shape; answers in them are ignored."""
    split: str = "train"
    """Dataset split: the split of a hub dataset to take prompts from."""
    limit: Rows | None = None
    """Row limit: takes at most this many prompts of each source. All when left out."""
    principles: str | None = None
    """Constitution: a YAML file of principles, each with `name`, `critique`, `revise` and `choose`; qalign's own 14
    when left out. Copy `qalign/judge/principles.yaml` and edit it."""
    start_from: str | None = None
    """Policy: the model that answers, criticises and revises: `sft` for this recipe's own SFT run, or a PEFT adapter
    folder; the base itself when left out."""
    revisions: int = Field(default=1, ge=0, le=16)
    """Revision rounds: how often each answer is criticised and rewritten, each time by a principle drawn at random. The
    paper takes 4; 0 makes no revisions."""
    candidates: int = Field(default=2, ge=0, le=64)
    """Candidates: answers sampled for each prompt and compared in pairs, the first with the second and so on; an even
    number. 0 makes no pairs."""
    labeller: str = "base"
    """Labeller: who judges the pairs: `base`, `sft`, the folder of a run or of a PEFT adapter that answers, on the one
    base; or a Python function `FILE.py:function(prompts, firsts, seconds, principles)`, which gives for each the
    probability that the first answer is better."""
    agree_with: Data | None = None
    """Human pairs: preferences that the labeller is measured on before it labels anything. No pairs are written if its
    agreement is no better than chance. 200 pairs or more; `limit` of an item keeps it short."""
    force: bool = False
    """Forced labelling: writes pairs even if the labeller agrees with people no better than chance, or wasn't measured.
    For tests of a chain, never for a model that anybody uses."""
    max_new_tokens: int = Field(default=256, ge=1, le=MAX_TOKENS)
    """Maximum answer length: of answers, critiques and revisions, in tokens. Answers that are cut are not written; a
    dialogue must leave this much room in `model.max_length`."""
    temperature: Positive = 1.0
    """Sampling temperature: of answers, critiques and revisions. Raise it if candidates are too alike."""

    def conflicts(self) -> Iterator[str]:
        if not (self.revisions or self.candidates):
            yield "revisions: 0, as is candidates, so there is nothing to do; set one of them"
        if self.candidates % 2:
            yield f"candidates: {self.candidates} answers leave one without another to compare; take an even number"
        if self.candidates and not self.agree_with and not self.force:
            yield (
                "agree_with: pairs are written once the labeller was measured on human ones; name some, or set "
                "candidates: 0 for revisions alone"
            )
        if self.agree_with and not self.candidates:
            yield "agree_with: measures who labels pairs, and candidates is 0; set it to 2, or remove this"

    @property
    def uses_sft(self) -> str | None:
        """The key by which it needs this recipe's own SFT run, if one does."""
        return next((key for key in ("start_from", "labeller") if getattr(self, key) == "sft"), None)
