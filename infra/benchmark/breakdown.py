"""Where the processor time of a request goes, alone on the service and with every slot at work."""

from __future__ import annotations

from functools import partial
from typing import Any

from .accounting import Accounting
from .client import Address
from .figures import Figures, Key
from .load import closed_loop
from .plan import Plan
from .sides import MAYFLY
from .workloads import SELECT, callers, check

_MOMENT = "the only one"


async def measure(plan: Plan, address: Address, tokens: list[bytes], accounting: Accounting) -> dict[str, Any]:
    figures = Figures()
    parts: dict[str, Any] = {}
    for concurrency in (plan.concurrencies[0], plan.concurrencies[-1]):
        streams = callers(SELECT, address, tokens[:concurrency], "breakdown")
        window = partial(closed_loop, address, streams, partial(check, SELECT), plan.breakdown)
        phase, parts[f"c={concurrency}"] = await accounting.around(window)
        figures.add(Key(MAYFLY, SELECT, concurrency), _MOMENT, phase)
    return {"figures": figures.as_json(), "cpu_us_per_request": parts}
