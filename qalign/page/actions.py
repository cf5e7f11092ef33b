"""What happens when a visitor does something, without any widgets: `ui.py` shows the `View`s that are made here."""

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from html import escape
from pathlib import Path
from typing import Any

from qalign.config.paths import looks_local
from qalign.config.recipe import Model
from qalign.data.formats import Message, check_text, prompts
from qalign.data.readers import BadRow
from qalign.errors import UserError
from qalign.page.chat import Chat, Controls, TokenSpan, error_text
from qalign.page.models import ModelEntry, default_pair
from qalign.page.session import CUT, Reply, Reward, Session
from qalign.page.votes import Choice, Tally, VoteFile, Votes, row, tally
from qalign.reports.plots import counted
from qalign.train.dataset import rows_under

MAX_COMMENT = 2000  # characters
Search = Callable[[list[str]], tuple[list[ModelEntry], Model] | None]
STATES = {"ended": "", "growing": "", "cut": "cut at max tokens", "stopped": "stopped"}
FULL_NATS = 2.0  # a difference with the strongest colour: the token is seven times as likely
STRONGEST = 0.6  # opacity of the strongest colour; the text on it stays legible
MORE, LESS = "37, 99, 235", "217, 119, 6"  # blue and amber: nearly all eyes can tell them apart, on white and on black


@dataclass(frozen=True)
class Inputs:
    """What the visitor has entered; `key` is the id of the browser session."""

    first: str = ""
    second: str = ""
    blind: bool = False
    differences: bool = False
    controls: Controls = field(default_factory=Controls)
    prompt: str = ""
    comment: str = ""
    key: str = ""


@dataclass(frozen=True)
class View:
    """What the page shows; pairs are left before right, and None leaves what is shown."""

    titles: tuple[str, str]
    dialogues: tuple[list[Message], list[Message]]
    figures: tuple[str, str]  # the line under each answer
    busy: bool = False  # answers are being generated
    can_vote: bool = False
    cut: str = ""  # says which answers haven't ended by themselves, so that they may go on
    status: str = ""  # a message
    prompt: str | None = None  # new contents of the prompt box
    comment: str | None = None  # new contents of the comment box
    tally: str | None = ""  # the votes so far, in words
    differences: str = ""  # coloured tokens, as HTML that is safe to show


class Page:
    """The actions of the page, on one chat and one file of votes. They change the visitor's session. `search` finds the
    models that are available now, and their base, with those first that it is given by name."""

    def __init__(self, chat: Chat, votes: VoteFile, search: Search = lambda words: None):
        self.chat, self.votes, self._search, self._opened = chat, votes, search, list[str]()

    def names(self) -> list[str]:
        """Names of all models, with runs that finished since the page was started."""
        with suppress(UserError):  # a named run may just be trained again; the known ones stay
            found = self._search(self._opened)
            for entry in found[0] if found and self.chat.entries else ():
                self.chat.entries.setdefault(entry.name, entry)
        return list(self.chat.entries)

    def pair(self) -> tuple[str, str]:
        """The two models that a comparison begins with; empty names if there is no run yet."""
        return default_pair([*self.chat.entries.values()], []) if self.chat.entries else ("", "")

    def open(self, run: Path) -> None:
        """Compares a finished run with its base from now on: its base is loaded if another one is in memory. A
        `UserError` if it can't be used."""
        words = [str(run)]
        if found := self._search(words):
            self.chat.hold(*found)
            self._opened = words

    def examples(self, count: int) -> list[str]:
        """Held-out questions of the newest run whose evaluation data is on this disk."""
        for entry in self.chat.entries.values():
            names = ("dpo", "kto", "ppo", "grpo", "sft")
            stages = [getattr(entry.recipe, name) for name in names] if entry.recipe else []
            stage = next((stage for stage in stages if stage and stage.has_held_out), None)
            if entry.recipe and stage and all(looks_local(s.path) for s in stage.eval_data or stage.data):
                with suppress(UserError):  # the file has been moved
                    few = stage.model_copy(update={"limit": 10 * count})
                    rows, _ = rows_under("eval_data", few, entry.recipe.seed, prompts)
                    return [row.turns[-1]["content"] for row in rows if len(row.turns) == 1][:count]
        return []

    def choose(self, session: Session, inputs: Inputs) -> View:
        """Other models, or a change of the blind test: starts a new dialogue."""
        self.chat.stop(inputs.key)
        session.choose(inputs.first, inputs.second, blind=inputs.blind)
        return self.view(session)

    def send(self, session: Session, inputs: Inputs) -> Iterator[View]:
        """Both answers as they grow. If that fails, the question returns to the prompt box, with the reason."""
        session.choose(inputs.first, inputs.second, blind=inputs.blind)
        dialogues, controls = session.ask(inputs.prompt), inputs.controls
        kept = {name: getattr(controls, name) for name in ("temperature", "top_p", "max_new_tokens")}
        growing = self.chat.answer(inputs.key, dialogues, controls)
        yield from self._grow(session, inputs, growing, lambda replies: session.add_replies(replies, kept))

    def _grow(
        self, session: Session, inputs: Inputs, growing: Iterator[list[Reply]], keep: Callable[[list[Reply]], None]
    ) -> Iterator[View]:
        """Shows answers as they grow, and gives the last ones to `keep` unless the dialogue changes meanwhile."""
        this_round, replies, is_new = session.round, [], not session.replies
        problem: dict[str, Any] = {}
        try:
            yield self.view(session, busy=True, prompt="" if is_new else None)
            for replies in growing:
                if session.round != this_round or session.voted:
                    break
                yield self.view(session, replies, busy=True)
            if session.round == this_round and not session.voted:
                if not replies:
                    raise UserError("stopped before the first token")
                keep(replies)
        except Exception as error:
            if session.round == this_round:
                problem = {"status": error_text(error), "prompt": inputs.prompt if is_new else None}
        finally:  # also when the client has left
            if session.round == this_round and not session.replies:
                session.undo()
        # Gradio shows the last view again, so it must be right even if another action has changed the dialogue.
        yield self.view(session, differences=self.differences(session, wanted=inputs.differences), **problem)

    def retry(self, session: Session, inputs: Inputs) -> Iterator[View]:
        """Asks the last question again."""
        if prompt := session.remove_last():
            yield from self.send(session, replace(inputs, prompt=prompt))
        else:
            yield self.view(session, status="There is nothing to retry yet.")

    def go_on(self, session: Session, inputs: Inputs) -> Iterator[View]:
        """Lets the answers go on that were cut or stopped, with the settings that they began with."""
        if not session.cut or session.voted:
            yield self.view(session, status="No answer was cut." if not session.cut else "The vote is given already.")
            return
        session.round += 1
        more, before = inputs.controls.max_new_tokens, max(len(r.ids) for r in session.replies if r.state in CUT)
        kept = {name: session.sampling[name] for name in ("temperature", "top_p")}
        growing = self.chat.go_on(inputs.key, session.replies, Controls(**kept, max_new_tokens=more))

        def keep(replies: list[Reply]) -> None:
            session.replace_replies(replies, {**kept, "max_new_tokens": before + more})

        yield from self._grow(session, inputs, growing, keep)

    def edit(self, session: Session, inputs: Inputs) -> View:
        """Returns the last question to the prompt box and removes its answers."""
        self.chat.stop(inputs.key)
        prompt = session.remove_last()
        return self.view(session, prompt=prompt or None, status="" if prompt else "There is nothing to edit yet.")

    def clear(self, session: Session, inputs: Inputs) -> View:
        """Starts a new dialogue."""
        self.chat.stop(inputs.key)
        session.clear()
        return self.view(session)

    def vote(self, choice: Choice, session: Session, inputs: Inputs) -> View:
        """Saves a vote and reveals the names."""
        try:
            check_text([inputs.comment])
            a, b = session.vote()
        except (UserError, BadRow) as error:
            return self.view(session, status=str(error))
        vote = row(choice, a, b, self.chat.model.base, session.sampling, inputs.comment[:MAX_COMMENT])
        try:
            self.votes.append(vote)
        except OSError as error:
            session.voted = False
            return self.view(session, status=f"The vote could not be saved: {error.strerror}.")
        use = f"It is not a training pair: {vote['no_pair']}." if "no_pair" in vote else "It is a training pair."
        coloured = self.differences(session, wanted=inputs.differences)
        return self.view(session, comment="", status=f"Vote saved. {use}", differences=coloured)

    def differences(self, session: Session, *, wanted: bool) -> str:
        """The coloured tokens of the aligned answer, or why there are none, as HTML; empty if the dialogue changes
        meanwhile."""
        this_round = session.round
        if not wanted or not session.replies:
            return ""
        if session.hides:
            return "<p>Hidden until you vote.</p>"
        reply = session.replies[session.aligned]
        if self.chat.entries[reply.model].adapter is None:
            return "<p>Both sides are the bare base, so there is no difference to show.</p>"
        try:
            shown = spans_html(self.chat.token_spans(reply), len(reply.ids), reply.model)
        except Exception as error:
            shown = f"<p>{escape(error_text(error))}</p>"
        return shown if session.round == this_round else ""

    def view(self, session: Session, growing: list[Reply] | None = None, **more: Any) -> View:
        """What the page shows of a session now. `growing` answers aren't in it yet; `more`: other fields of `View`."""
        dialogues, figures, replies = [], [], growing or session.replies
        for number in session.order:
            turns = list(session.turns[number])
            if growing:
                answered = turns[-1]["role"] == "assistant"  # this answer goes on
                turns = [*turns[: -1 if answered else None], {"role": "assistant", "content": growing[number].text}]
            dialogues.append(turns)
            figures.append(figures_text(replies[number], hidden=session.hides) if replies else "")
        tally = None if more.get("busy") else self.tally(session)  # it hashes weights and reads a file
        cut = cut_text(session.cut) if session.cut and not session.voted and not more.get("busy") else ""
        more = {"tally": tally, "can_vote": session.can_vote, "cut": cut, **more}
        return View(session.titles, tuple(dialogues), tuple(figures), **more)

    def tally(self, session: Session) -> str:
        """The votes between the two models so far, in words, and how many votes of the file will train."""
        aligned, other = (session.names[number] for number in (session.aligned, 1 - session.aligned))
        try:
            votes = self.votes.read()
        except OSError as error:
            return f"{self.votes.path.name} can't be read: {error.strerror}."
        if aligned == other:
            text = "Both sides are the same model: votes still give training pairs, but there is no winner to count."
        else:
            models = [(name, self.chat.weights_hash(name)) for name in (aligned, other)]
            text = tally_text(tally(votes.rows, *models), aligned, other)
        return f"{text} {votes_text(votes)}".strip()


def figures_text(reply: Reply, *, hidden: bool) -> str:
    """Length and speed of an answer; if not hidden, also what could identify its model."""
    facts = [f"{len(reply.ids)} tokens", f"{reply.tokens_per_second:.1f} tokens/s", STATES[reply.state]]
    if not hidden and reply.state != "growing":
        facts += [
            f"λ {reply.dial:g}" if reply.mixed_with else "",
            f"seed {reply.seed}",
            reward_text(reply.reward) if reply.reward else "",
        ]
    return " · ".join(filter(None, facts))


def reward_text(reward: Reward) -> str:
    """A score with its model, and where it lies among this model's scores of held-out answers: a score alone has no
    scale."""
    place = "" if reward.above is None else f", above {reward.above:.0%} of its held-out answers"
    return f"reward {reward.score:+.2f} by {reward.model}{place}"


def cut_text(titles: list[str]) -> str:
    """What a visitor should know before voting, with the titles of the sides that were cut."""
    have = "have" if len(titles) > 1 else "has"
    return f"{' and '.join(titles)} {have} not ended. Training leaves out a vote for an answer that was cut."


def tally_text(votes: Tally, model: str, other: str) -> str:
    """A tally in words."""
    if not votes.votes:
        return f"No blind votes between {model} and {other} yet."
    low, high = votes.interval
    text = (
        f"{model} wins {votes.win_rate:.0%} of {votes.votes} blind votes against {other} (95% interval {low:.0%} to "
        f"{high:.0%}): {votes.wins} won, {votes.losses} lost, {votes.ties} tied, {votes.both_bad} both bad; ties and "
        "both bad count half. "
    )
    if votes.votes_missing is None:
        return text + "The votes are even, so more votes like these would not decide it."
    if votes.votes_missing:
        return text + f"If votes continue like this, about {votes.votes_missing} more are needed to be sure."
    return text + f"The interval excludes 50%: {model} is {'better' if votes.win_rate > 0.5 else 'worse'}."


def votes_text(votes: Votes) -> str:
    """What training makes of a file of votes; empty if there are none."""
    text, left_out = "", votes.left_out
    if votes.rows:
        trained = len(votes.rows) - left_out.total()
        text = f"{trained} of {counted(len(votes.rows), 'vote')} in the file will train."
        reasons = "; ".join(f"{number} × {reason[:100]}" for reason, number in left_out.most_common(5))
        text += f" Left out: {reasons}." if reasons else ""
    if votes.unreadable:
        some = ", ".join(map(str, votes.unreadable[:5])) + (", …" if len(votes.unreadable) > 5 else "")
        text += f" {counted(len(votes.unreadable), 'line')} of the file can't be read as a vote ({some})."
    return text.strip()


def spans_html(spans: list[TokenSpan], num_tokens: int, model: str) -> str:
    """An answer of `model` with its tokens coloured by log π/π_ref, as HTML with a legend and the sum."""
    legend = "".join(_span_html(nats, _signed(nats)) for nats in (-FULL_NATS, -1, 0, 1, FULL_NATS))
    text, total = "".join(_span_html(span.nats, span.text) for span in spans), sum(span.nats for span in spans)
    return (
        f'<div><p class="legend">less likely {legend} more likely under {escape(model)} than under the base, in nats '
        f'per token (log π/π_ref)</p><p class="coloured">{text}</p>'
        f'<p class="sum">sum over {num_tokens} tokens: <b>{_signed(total)} nats</b></p></div>'
    )


def _span_html(nats: float, text: str) -> str:
    opacity = min(1.0, abs(nats) / FULL_NATS) * STRONGEST
    colour = f"rgba({MORE if nats > 0 else LESS}, {opacity:.2f})"
    return f'<span class="token" style="background-color: {colour}" title="{_signed(nats)} nats">{escape(text)}</span>'


def _signed(nats: float) -> str:
    return f"{nats:+.2f}".replace("-", "−")
