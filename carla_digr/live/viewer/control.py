"""What the page may ask for, once it has shown the token: checked and answered here, done by who has the drive.

A page is open to all who reach its port; to steer needs the token, which the start prints in the page's address, behind
a ``#``, so that browsers send it to nobody. ``{"token": TEXT}`` on the stream is answered by ``{"type": "control",
"granted": true or false}``; then ``{"id": NUMBER, "words": [...]}`` says what `carla-digr ctl` says, and is answered by
``{"type": "answer", "id": NUMBER, "ok": true or false, "said": SENTENCE}``.
"""

from __future__ import annotations

import hmac
import json
import logging
import os
import secrets
import time
from collections.abc import Sequence
from typing import Any, Protocol

from carla_digr.errors import UserError

log = logging.getLogger(__name__)

TOKEN = "CARLA_DIGR_PAGE_TOKEN"  # noqa: S105 - environment variable with it, where a restarted page must keep it
WORDS, LONGEST_WORD = 8, 200  # of one request
RATE, BURST = 30.0, 30  # requests a second of one page, and at once
AT_ONCE = 8  # requests of one page that wait for an answer
WRONG_TOKENS = 5  # of one connection, after which it is closed


class Controls(Protocol):
    """Who has the drive."""

    def do(self, words: Sequence[str]) -> str:
        """Do what the words say, and return what to tell. Called in a thread, by several at once.

        Raises:
            UserError: it cannot be done.
        """


def new_token() -> str:
    """The token of this environment, or a new one."""
    return os.environ.get(TOKEN) or secrets.token_urlsafe(16)


class Gate:
    """One page's requests: who may ask, how often, and for what.

    Args:
        token: of this server; None: there is nothing to control.
        clock: monotonic time in seconds.
    """

    def __init__(self, token: str | None, clock=time.monotonic):
        self.granted = False
        self.waiting = 0
        self._token = token
        self._clock = clock
        self._wrong = 0
        self._left, self._since = float(BURST), clock()

    def take(self, text: str) -> dict[str, Any] | tuple[int, tuple[str, ...]]:
        """A message of the page: the answer to it, or the number and the words of a request that is to be done.

        Raises:
            ValueError: no page of ours sends that.
        """
        message = json.loads(text)
        if not isinstance(message, dict):
            raise ValueError("no object")
        if set(message) == {"token"}:
            return self._grant(message["token"])
        if set(message) != {"id", "words"}:
            raise ValueError("no request")
        number, words = message["id"], message["words"]
        if type(number) is not int or not 0 <= number < 2**53 or not isinstance(words, list):
            raise ValueError("no request")
        if not 0 < len(words) <= WORDS or not all(isinstance(w, str) and len(w) <= LONGEST_WORD for w in words):
            raise ValueError("no words")
        if not self.granted:
            return answer(number, False, "Only the address with the token, which the start prints, controls the drive.")
        if not self._in_time() or self.waiting >= AT_ONCE:
            return answer(number, False, "Too many requests at once: this one is left out.")
        return number, tuple(words)

    def _grant(self, token: Any) -> dict[str, Any]:
        right = isinstance(token, str) and self._token is not None
        self.granted = right and hmac.compare_digest(token.encode(), str(self._token).encode())
        self._wrong += not self.granted
        if self._wrong >= WRONG_TOKENS:
            raise ValueError("wrong tokens")
        return {"type": "control", "granted": self.granted}

    def _in_time(self) -> bool:
        now = self._clock()
        self._left, self._since = min(self._left + (now - self._since) * RATE, float(BURST)), now
        if self._left < 1.0:
            return False
        self._left -= 1.0
        return True


def answer(number: int, ok: bool, said: str) -> dict[str, Any]:
    """What the page is told about a request."""
    return {"type": "answer", "id": number, "ok": ok, "said": said}


def done(controls: Controls, number: int, words: tuple[str, ...]) -> dict[str, Any]:
    """Do what a request asks for; the answer to it."""
    try:
        return answer(number, True, controls.do(words))
    except UserError as error:
        return answer(number, False, str(error))
    except Exception:
        log.exception("A request of the page failed: %s", words[0])
        return answer(number, False, "That failed; the log says why.")
