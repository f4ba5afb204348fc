"""What the demo asks of the engine: long documents with several questions each, and a conversation. Knows no engine."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files

from lmpipe.demo.tokens import tokens_of as tokens_of

DOCUMENTS = {
    "compound-statements": (
        "Which statement runs its clean-up code even when an exception is raised?",
        "What does the else clause of a loop do?",
        "Name the targets that an assignment in a with statement may have.",
    ),
    "special-method-names": (
        "Which method is called when an instance is created?",
        "When is an object's hash needed, and what must it agree with?",
        "How may a class take part in the protocol of iterators?",
    ),
}
"""Text file and questions."""

CONVERSATION = (
    "May I change the program and sell what I made of it? Answer in plain words and name the section that says so.",
    "And if I only run it on my own servers, and never hand a copy to anybody: what must I do then, if anything?",
    "What happens to the patent grant when somebody goes to court over the work? Be exact about when it ends.",
    "Sum up what we have said so far in three sentences that I may give to a colleague who has not read any of it.",
)
"""The user's side of a conversation about `apache-license`."""


@dataclass(frozen=True, slots=True)
class WorkloadSize:
    """How much of the workload is run. Text lengths are in bytes, which are tokens here."""

    documents: int
    questions: int
    document_tokens: int
    turns: int
    conversation_tokens: int
    answer_tokens: int
    turn_answer_tokens: int

    @property
    def longest(self) -> int:
        """Tokens of the longest request with its answer, at most."""
        turns = self.conversation_tokens + self.turns * (SAID_TOKENS + self.turn_answer_tokens)
        return max(self.document_tokens + SAID_TOKENS + self.answer_tokens, turns)

    @property
    def tokens(self) -> int:
        """Of which there is KV in the end, at most."""
        asked = self.questions * (SAID_TOKENS + self.answer_tokens)
        turns = self.conversation_tokens + self.turns * (SAID_TOKENS + self.turn_answer_tokens)
        return self.documents * (self.document_tokens + asked) + turns


SAID_TOKENS = 256
"""A question or a turn, with the words around it, is shorter."""
FULL = WorkloadSize(2, 3, 4096, 3, 2560, 16, 64)
QUICK = WorkloadSize(2, 2, 1024, 2, 768, 8, 32)
LONG = WorkloadSize(2, 3, 16384, 3, 8192, 16, 64)
MIDDLE = WorkloadSize(2, 2, 4096, 2, 2560, 8, 32)
"""Of a GPU, which takes no longer for them."""


@dataclass(frozen=True, slots=True)
class Request:
    """One call of generate. `first` or `last` of its document or conversation."""

    name: str
    tokens: list[int]
    new_tokens: int
    first: bool
    last: bool


def text_of(name: str) -> str:
    """A shipped text."""
    return files("lmpipe.demo").joinpath("text", f"{name}.txt").read_text("utf-8")


def document_requests(size: WorkloadSize) -> list[Request]:
    """Every question about every document, document by document."""
    requests: list[Request] = []
    for name, questions in list(DOCUMENTS.items())[: size.documents]:
        text = text_of(name)[: size.document_tokens]
        for index, question in enumerate(questions[: size.questions]):
            prompt = f"{text}\n\nQuestion: {question}\nAnswer:"
            last = index == size.questions - 1
            requests.append(Request(f"{name} {index + 1}", tokens_of(prompt), size.answer_tokens, index == 0, last))
    return requests


def turn_request(size: WorkloadSize, turn: int, history: list[int]) -> Request:
    """The next turn: everything so far, the engine's own answers included, and what the user says now."""
    said = f"\n\nUser: {CONVERSATION[turn]}\nAssistant:"
    if turn == 0:
        tokens = tokens_of(text_of("apache-license")[: size.conversation_tokens] + said)
    else:
        tokens = history + tokens_of(said)[1:]
    return Request(f"conversation {turn + 1}", tokens, size.turn_answer_tokens, turn == 0, turn == size.turns - 1)
