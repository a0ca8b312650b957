"""The grid of a soak: each kind of call in its turn, by the road on which it really comes.

The operator's own is announced by the API; the price rule hears of a dear hour from the feed; the frequency's readings come by the API
each minute; an OpenADR 3 programme is asked over HTTP by our VEN, and answered by our VTN.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from random import Random
from typing import TYPE_CHECKING, Any, Self

from marketplace.models import Miner, PowerNode
from marketplace.services import grid
from sandbox.vtn import Vtn

if TYPE_CHECKING:
    from sandbox.soak.soak import Soak

MINUTE = timedelta(minutes=1)
FIRST, APART = 3, (5, 9)  # minutes of the site's time until the first call, and between two
LASTS = (3, 8)  # minutes
USUAL, DEAR = 42_000_000, 320_000_000  # micro-USD a MWh
CALM_MHZ, LOW_MHZ = 60_000, 59_500
PROGRAM, SECRET = "operating envelope", "the VEN's own"
SQUEEZE_W = 3_000  # less than one machine draws
KINDS = ("operator", "price", "frequency", "openadr3")


class Calls:
    """Who calls on the site, and how the grid is: what energy costs (`uusd_mwh`) and its frequency (`mhz`)."""

    def __init__(self, soak: Soak, dice: Random) -> None:
        self.soak, self.dice = soak, dice
        self.vtn = Vtn(secret=SECRET)
        self.uusd_mwh, self.mhz = USUAL, CALM_MHZ
        self.waiting: list[str] = []
        self.made = 0
        self.read_at: datetime | None = None  # when the frequency's meter speaks next; none before the site is open

    def __enter__(self) -> Self:
        self.serving = self.vtn.httpd.beside()
        self.serving.__enter__()
        self.vtn.control({"program": {"id": "1", "programName": PROGRAM}})
        return self

    def __exit__(self, *_: object) -> None:
        self.serving.__exit__(None, None, None)

    # --- who is listened to
    def begin(self) -> None:
        """The operator connects the site with its grid."""
        soak = self.soak
        nodes = soak.operator.get(f"sites/{soak.site.public_id}/power-nodes")["data"]
        self.node = next(n["id"] for n in nodes if n["parent"] is None)
        self._add(
            "price",
            cap_w=self._watts(0.5),
            strike_uusd_mwh=200_000_000,
            resume_uusd_mwh=80_000_000,
            windows=1,
            resume_windows=1,
        )
        low = {"trip_mhz": 59_700, "back_mhz": 59_900, "hold_s": 180, "stale_after_s": 600}
        self.meter = self._add("frequency", cap_w=self._watts(0.4), **low)
        self._add(
            "openadr3", cap_w=self._watts(0.6), url=self.vtn.httpd.url, client_id="ven", secret=SECRET, ven_name="tailrace",
            program=PROGRAM, poll_s=30,
        )  # fmt: skip
        self.read_at = soak.clock.now
        self.next_at = self.calm_at = self.squeezed_until = soak.clock.now + FIRST * MINUTE

    def _add(self, kind: str, **fields: Any) -> str:
        return str(
            self.soak.operator.post("grid-sources", {"node": self.node, "kind": kind, "name": kind, **fields})["id"]
        )

    def _watts(self, share: float) -> int:
        return round(float(self.soak.site.physics.cap[0]) * share)

    # --- time
    def listen(self) -> None:
        """What control hears: the meter of the frequency each minute, and all else when its beat asks for it."""
        now = self.soak.clock.now
        if self.read_at is not None and now >= self.read_at:
            self.read_at = now + MINUTE
            self.soak.operator.post(
                f"grid-sources/{self.meter}/readings", {"millihertz": self.mhz, "at": now.isoformat()}
            )
        grid.tick()

    def turn(self) -> None:
        """The next call, when it is its time; every kind in turn, shuffled anew each round."""
        now = self.soak.clock.now
        if now >= self.calm_at:
            self.uusd_mwh, self.mhz = USUAL, CALM_MHZ
        if now < self.next_at:
            return
        if not self.waiting:
            self.waiting = list(KINDS)
            self.dice.shuffle(self.waiting)
        lasts = MINUTE * self.dice.randint(*LASTS)
        getattr(self, f"_{self.waiting.pop()}")(lasts)
        self.made += 1
        self.next_at = now + MINUTE * self.dice.uniform(*APART)

    def end(self) -> None:
        """The grid is well again, and calls on nobody."""
        self.uusd_mwh, self.mhz = USUAL, CALM_MHZ
        for event in list(self.vtn.events):
            self.vtn.control({"delete": event})

    def squeeze(self) -> None:
        """The operator asks a PDU for a machine's watts less than its books hold, so that one has to sleep; nobody, while all do."""
        soak, now = self.soak, self.soak.clock.now
        awake = Miner.objects.filter(site=soak.site.pk, state="ok", desired_mode__gt=0)
        if not soak.control or now < self.squeezed_until or not awake.exists():
            return
        pdu = self.dice.choice(sorted(PowerNode.objects.filter(miners__in=awake).distinct(), key=lambda n: n.name))
        cap_w = -(-pdu.reserved_mw // 1000) + pdu.fixed_w + pdu.margin_w - SQUEEZE_W
        self.squeezed_until = now + FIRST * MINUTE
        body = {
            "node": pdu.public_id, "cap_w": min(cap_w, pdu.cap_w), "starts_at": now.isoformat(),
            "ends_at": self.squeezed_until.isoformat(), "reference": f"squeeze at {now:%T}",
        }  # fmt: skip
        soak.operator.post("curtailments", body)

    # --- each kind
    def _operator(self, lasts: timedelta) -> None:
        starts = self.soak.clock.now + MINUTE * self.dice.choice((0, 0, 2))
        body = {
            "node": self.node, "cap_w": self._watts(self.dice.choice((0.4, 0.6, 0.8))), "starts_at": starts.isoformat(),
            "ends_at": (starts + lasts).isoformat(), "reference": f"call {self.made}",
        }  # fmt: skip
        self.soak.operator.post("curtailments", body)

    def _price(self, lasts: timedelta) -> None:
        self.uusd_mwh, self.calm_at = DEAR, self.soak.clock.now + lasts

    def _frequency(self, lasts: timedelta) -> None:
        self.mhz, self.calm_at = LOW_MHZ, self.soak.clock.now + lasts

    def _openadr3(self, lasts: timedelta) -> None:
        watts = self._watts(self.dice.choice((0.4, 0.6, 0.8)))
        start = (self.soak.clock.now + MINUTE).replace(microsecond=0)
        self.vtn.control({"event": {
            "id": str(self.made), "objectType": "EVENT", "programID": "1", "eventName": f"envelope {self.made}",
            "intervalPeriod": {"start": f"{start:%Y-%m-%dT%H:%M:%SZ}", "duration": f"PT{int(lasts.total_seconds()) // 60}M"},
            "payloadDescriptors": [{"objectType": "EVENT_PAYLOAD_DESCRIPTOR", "payloadType": "IMPORT_CAPACITY_LIMIT", "units": "KW"}],
            "intervals": [{"id": 0, "payloads": [{"type": "IMPORT_CAPACITY_LIMIT", "values": [watts / 1000]}]}],
        }})  # fmt: skip
