"""Questions of a page about a frame: which picture it is, who may ask, and the answer as a frame's message.

``GET /api/ask/SIDE/FRAME/KIND?what=WHAT`` with the token as ``Authorization: token TOKEN``: SIDE and FRAME as of a
recording (``bag=NAME`` says which of a folder), or 0 and a live frame's ``sequence``; KIND and WHAT of
`questions.Question`. The answer is a binary message
like a frame's, with ``found`` in its header. Pages are told the ``progress`` of what takes long as a state.
"""

from __future__ import annotations

import asyncio
import hmac
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
from aiohttp import web
from numpy.typing import NDArray

from carla_digr.errors import UserError
from carla_digr.live.questions import KINDS, Question, Questions
from carla_digr.live.viewer.message import encode, plain

if TYPE_CHECKING:
    from carla_digr.live.viewer.shelf import Opened, Shelf

KEPT_BYTES = 1 << 26  # of the pictures of a live drive
KEPT = 1200  # of them: a minute, as in the page
WAITING = 8  # questions, with the one that is being answered
LONGEST = 100  # characters of what is asked


class Asking:
    """Has questions about frames answered.

    Args:
        policy: weights and module of the policy of a side, called in a thread; UserError: it is not known. None: there
            are recordings.
        recordings: those that are asked about; None: frames that were kept by `keep`.
    """

    def __init__(
        self, policy: Callable[[int], tuple[str, str]] | None = None, recordings: Opened | Shelf | None = None
    ):
        self._policy, self._recordings = policy, recordings
        self._questions = Questions()
        self._pictures: OrderedDict[int, NDArray[np.uint8]] = OrderedDict()  # by sequence
        self._waiting = 0
        self._thread = ThreadPoolExecutor(1, "questions")  # of its own: who asks keeps nobody from the controls

    def keep(self, sequence: int, rgb: NDArray[np.uint8]) -> None:
        """A live frame that may be asked about."""
        self._pictures[sequence] = rgb
        while len(self._pictures) > KEPT or len(self._pictures) * rgb.nbytes > KEPT_BYTES:
            self._pictures.popitem(last=False)

    def close(self) -> None:
        """End the process that answers."""
        self._questions.close()
        self._thread.shutdown(cancel_futures=True)

    def handler(self, token: str, tell: Callable[[Mapping[str, Any]], None]) -> Callable[[web.Request], Any]:
        """What answers a request.

        Args:
            token: that of the page's address.
            tell: gives pages a state.
        """

        async def get(request: web.Request) -> web.Response:
            shown = request.headers.get("Authorization", "").removeprefix("token ")
            if not hmac.compare_digest(shown.encode(), token.encode()):
                raise web.HTTPUnauthorized(text="Only the address with the token, which the start prints, may ask.\n")
            side, index, kind = (request.match_info[name] for name in ("side", "index", "kind"))
            what, bags = request.query.get("what", ""), request.query.getall("bag", [])
            if kind not in KINDS or len(what) > LONGEST:
                raise web.HTTPNotFound(text="Nobody answers that.\n")
            if self._waiting >= WAITING:
                raise web.HTTPTooManyRequests(text="Too many questions at once: ask again when one is answered.\n")
            self._waiting += 1
            try:
                answer = asyncio.get_running_loop().run_in_executor(
                    self._thread, self._answer, bags, int(side), int(index), kind, what, tell
                )
                return web.Response(body=await answer, content_type="application/octet-stream")
            except LookupError:
                raise web.HTTPNotFound(text="That frame is not kept any more.\n") from None
            except (UserError, ValueError) as error:
                raise web.HTTPUnprocessableEntity(text=f"{error}\n") from None
            finally:
                self._waiting -= 1

        return get

    def _answer(
        self,
        bags: Sequence[str],
        side: int,
        index: int,
        kind: str,
        what: str,
        tell: Callable[[Mapping[str, Any]], None],
    ) -> bytes:
        if self._recordings is not None:
            recorded, _ = self._recordings.find(bags)
            rgb, _ = recorded.pictures(side, index)
            weights, module = recorded.policy(side)
        else:
            assert self._policy is not None
            rgb = self._pictures[index]
            weights, module = self._policy(side)
        question = Question(weights, kind, what, module)
        answer = self._questions.ask(question, rgb, lambda share: tell({"progress": share}))
        header = {
            "width": answer.picture.shape[1],
            "height": answer.picture.shape[0],
            "saliency": None if answer.map is None else list(answer.map.shape),
            "found": plain(answer.found),
        }
        return encode(header, np.ascontiguousarray(answer.picture), answer.map)
