"""What the page does when a person does something, without any of its widgets: `app.py` shows the `View`s made here."""

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from html import escape

from qalign.config.paths import looks_local
from qalign.data.formats import Message, check_text, prompts
from qalign.data.readers import BadRow
from qalign.errors import UserError
from qalign.page.chat import Chat, Controls, Reply, explained
from qalign.page.colours import html
from qalign.page.models import ModelEntry
from qalign.page.session import Session
from qalign.page.votes import Choice, Tally, VoteFile, row, tally

SAMPLING = ("temperature", "top_p", "max_new_tokens")  # of what is asked for, what a vote keeps
MAX_COMMENT = 2000  # characters
STATES = {"ended": "", "growing": "", "cut": "cut at max tokens", "stopped": "stopped"}


@dataclass(frozen=True)
class View:
    """What is to be seen, left before right.

    Attributes:
        titles: over the sides.
        dialogues: turns of each.
        figures: under each, in words.
        busy: whether answers are growing.
        can_vote: whether there are two answers to judge.
        status: a message, empty if there is none.
        prompt: what the prompt box shall hold; None leaves it.
        tally: votes so far, in words; None leaves what is shown.
        differences: coloured tokens, as HTML that is safe to show.
    """

    titles: tuple[str, str]
    dialogues: tuple[list[Message], list[Message]]
    figures: tuple[str, str]
    busy: bool = False
    can_vote: bool = False
    status: str = ""
    prompt: str | None = None
    tally: str | None = ""
    differences: str = ""


@dataclass(frozen=True)
class Wish:
    """What a person has set on the page."""

    first: str
    second: str
    blind: bool = False
    differences: bool = False
    controls: Controls = field(default_factory=Controls)


class Page:
    """The actions of the page, on one chat and one file of votes.

    Args:
        search: finds the contenders there are by now.
    """

    def __init__(self, chat: Chat, votes: VoteFile, search: Callable[[], list[ModelEntry]] = list):
        self.chat, self.votes, self._search = chat, votes, search

    def names(self) -> list[str]:
        """Of all contenders, runs that were finished since included."""
        with suppress(UserError):  # one that was named is being trained again, say: those known stay
            for contender in self._search():
                self.chat.contenders.setdefault(contender.name, contender)
        return list(self.chat.contenders)

    def examples(self, count: int) -> list[str]:
        """Questions that the newest run with held-out rows on this disk was not trained on."""
        for contender in self.chat.contenders.values():
            recipe = contender.recipe
            settings = recipe and next((s for s in (recipe.dpo, recipe.ppo, recipe.sft) if s and s.eval_data), None)
            if not settings or not all(looks_local(source.path) for source in settings.eval_data):
                continue
            try:
                rows, _ = prompts(settings.eval_data, settings.split, 10 * count, 0)
            except UserError:  # moved since
                continue
            return [row.turns[-1]["content"] for row in rows if len(row.turns) == 1][:count]
        return []

    def choose(self, duel: Session, wish: Wish, key: str) -> View:
        """Other models, or blind or not: a new dialogue."""
        self.chat.stop(key)
        duel.choose(wish.first, wish.second, blind=wish.blind)
        return self.view(duel)

    def send(self, duel: Session, wish: Wish, prompt: str, key: str) -> Iterator[View]:
        """Both answers as they grow. If that fails, the question stands in the prompt box again, with the reason."""
        duel.choose(wish.first, wish.second, blind=wish.blind)
        asked, replies, failed = duel.ask(prompt), [], {}
        ours = duel.round
        try:
            yield self.view(duel, busy=True, prompt="")
            for replies in self.chat.answer(key, asked, wish.controls):
                if duel.round != ours:  # cleared meanwhile: these answer nothing any more
                    break
                yield self.view(duel, replies, busy=True)
            if duel.round == ours:
                if not replies:
                    raise UserError("stopped before the first token")
                duel.take(replies, {name: getattr(wish.controls, name) for name in SAMPLING})
        except Exception as error:
            if duel.round == ours:
                failed = {"status": explained(error), "prompt": prompt}
        finally:  # also where the client left
            if duel.round == ours and not duel.replies:
                duel.undo()
        # Gradio shows once more what came last, so this comes even where another action has shown it already.
        yield self.view(duel, differences=self.differences(duel, wanted=wish.differences), **failed)

    def retry(self, duel: Session, wish: Wish, key: str) -> Iterator[View]:
        """The last question once more."""
        if prompt := duel.take_back():
            yield from self.send(duel, wish, prompt, key)
        else:
            yield self.view(duel, status="There is nothing to retry yet.")

    def edit(self, duel: Session, key: str) -> View:
        """The last question back in the prompt box, its answers gone."""
        self.chat.stop(key)
        prompt = duel.take_back()
        return self.view(duel, prompt=prompt or None, status="" if prompt else "There is nothing to edit yet.")

    def clear(self, duel: Session, key: str) -> View:
        """A new dialogue."""
        self.chat.stop(key)
        duel.clear()
        return self.view(duel)

    def vote(self, duel: Session, wish: Wish, choice: Choice, comment: str) -> View:
        """Writes a vote down, and tells who was who."""
        try:
            check_text([comment])
            a, b = duel.vote(choice, self.chat.weights)
        except (UserError, BadRow) as error:
            return self.view(duel, status=str(error))
        vote = row(choice, a, b, self.chat.model.base, duel.sampling, comment[:MAX_COMMENT])
        try:
            self.votes.append(vote)
        except OSError as error:
            duel.voted = False
            return self.view(duel, status=f"The vote could not be written: {error.strerror}.")
        trains = f"It trains nothing: {vote['no_pair']}." if "no_pair" in vote else "It is a training pair."
        return self.view(
            duel, status=f"Vote kept. {trains}", differences=self.differences(duel, wanted=wish.differences)
        )

    def differences(self, duel: Session, *, wanted: bool) -> str:
        """The aligned answer's tokens, coloured, as HTML; a word on why not, where there are none. Nothing if the
        dialogue changes meanwhile."""
        asked = duel.round
        if not wanted or not duel.replies:
            return ""
        if duel.hides:
            return "<p>Hidden until you vote.</p>"
        name = duel.names[duel.aligned]
        if self.chat.contenders[name].adapter is None:
            return "<p>Both sides are the bare base: there is no difference to show.</p>"
        try:
            shown = html(self.chat.differences(duel.replies[duel.aligned]), name, "base")
        except Exception as error:
            shown = f"<p>{escape(explained(error))}</p>"
        return shown if duel.round == asked else ""

    def view(self, duel: Session, replies: list[Reply] | None = None, **more) -> View:
        """What is to be seen of a duel now.

        Args:
            replies: answers that are growing, not yet part of the dialogue.
            more: other fields of `View`.
        """
        shown = replies or duel.replies
        dialogues, figures = [], []
        for number in duel.order:
            growing = [{"role": "assistant", "content": replies[number].text}] if replies else []
            dialogues.append([*duel.turns[number], *growing])
            figures.append(figures_of(shown[number], hidden=duel.hides) if shown else "")
        tally = None if more.get("busy") else self.tally(duel)  # it hashes weights and reads a file
        more = {"tally": tally, "can_vote": duel.can_vote, **more}
        return View(duel.titles, tuple(dialogues), tuple(figures), **more)

    def tally(self, duel: Session) -> str:
        """The votes between these two so far, in words."""
        ours, other = (duel.names[number] for number in (duel.aligned, 1 - duel.aligned))
        if ours == other:
            return "Both sides are the same model: votes between its answers train, and there is no winner to count."
        sides = ((name, self._weights(name)) for name in (ours, other))
        return tally_words(tally(self.votes.read(), *sides), ours, other)

    def _weights(self, name: str) -> str | None:
        """The hash of a contender's weights: those on the base, or those that would be put on it."""
        if name in self.chat.weights:
            return self.chat.weights[name]
        contender = self.chat.contenders.get(name)
        return contender and contender.weights


def figures_of(reply: Reply, *, hidden: bool) -> str:
    """Length and speed of an answer; what could tell who gave it only if it isn't hidden."""
    facts = [f"{len(reply.ids)} tokens", f"{reply.tokens_per_second:.1f} tokens/s", STATES[reply.state]]
    if not hidden and reply.state != "growing":
        facts += [f"seed {reply.seed}", "" if reply.reward is None else f"reward {reply.reward:+.2f}"]
    return " · ".join(filter(None, facts))


def tally_words(votes: Tally, ours: str, other: str) -> str:
    """A tally in a sentence or two."""
    if not votes.votes:
        return f"No blind votes on {ours} against {other} yet."
    low, high = votes.interval
    words = (
        f"{ours} wins {votes.share:.0%} of {votes.votes} blind votes against {other} (95% interval {low:.0%} to "
        f"{high:.0%}; {votes.wins} won, {votes.losses} lost, {votes.ties} tied, {votes.both_bad} both bad, which count "
        "half). "
    )
    missing = votes.votes_missing
    if missing is None:
        return words + "Even so far: no number of such votes would tell them apart."
    if missing:
        return words + f"If votes go on like this, about {missing} more would make sure."
    return words + f"That is sure enough: {'better' if votes.share > 0.5 else 'worse'} than even."
