"""The doors of docs/agent-protocol.md on the web process: enrol, logs, and sync without waiting (the stream process waits)."""

import io
import json
import zlib
from typing import Any, cast

from django.conf import settings
from django.core.validators import ProhibitNullCharactersValidator
from django.utils import timezone
from drf_spectacular.utils import extend_schema
from rest_framework import serializers
from rest_framework.exceptions import ParseError
from rest_framework.parsers import JSONParser
from rest_framework.request import Request
from rest_framework.response import Response
from rest_framework.views import APIView

from marketplace import ids
from marketplace.api.auth import AgentAuthentication
from marketplace.api.base import PublicId, Shape
from marketplace.models import Agent, Site
from marketplace.services import agents

MAX_BODY = 16 << 20


class EnrolShape(Shape):
    token = serializers.CharField(max_length=80)
    name = serializers.RegexField(r"^[\w.-]{1,60}$")
    version = serializers.CharField(max_length=24, required=False, default="")
    runtime = serializers.ChoiceField(
        ["process", "virtual", "bubblewrap", "podman", "docker", "slurm", "kubernetes"],
        required=False,
        default="process",
    )


INT, BIGINT = (1 << 31) - 1, (1 << 63) - 1  # what the columns hold


class Output(serializers.CharField):
    """What a process wrote: any character. NUL, which DRF refuses and PostgreSQL does not keep, is replaced when it is stored."""

    def __init__(self, **options: Any) -> None:
        super().__init__(trim_whitespace=False, allow_blank=True, **options)
        self.validators = [v for v in self.validators if not isinstance(v, ProhibitNullCharactersValidator)]


class HostState(serializers.Serializer):
    name = serializers.CharField()
    beat_at = serializers.DateTimeField()
    power_state = serializers.ChoiceField(["off", "parked", "capped", "full"])
    generation = serializers.IntegerField(required=False, default=0, min_value=0, max_value=BIGINT)
    limits_w = serializers.ListField(child=serializers.IntegerField(), required=False, default=list)
    measured_w = serializers.IntegerField(required=False, allow_null=True, default=None, min_value=0, max_value=INT)
    gpu_errors = serializers.ListField(required=False, default=list)


class PlacementState(serializers.Serializer):
    id = PublicId("plc", source="pk")
    generation = serializers.IntegerField()
    state = serializers.ChoiceField(["starting", "running", "draining", "exited", "failed", "unknown"])
    running_at = serializers.DateTimeField(required=False, allow_null=True, default=None)
    finished_at = serializers.DateTimeField(required=False, allow_null=True, default=None)
    checkpoint_at = serializers.DateTimeField(
        required=False, allow_null=True, default=None, help_text="when the work last said that it has saved its state"
    )
    exit_code = serializers.IntegerField(
        required=False, allow_null=True, default=None, min_value=-INT - 1, max_value=INT
    )
    reason = serializers.CharField(required=False, allow_blank=True, default="")


class EventShape(serializers.Serializer):
    id = serializers.UUIDField()
    at = serializers.DateTimeField()
    kind = serializers.CharField(max_length=40)
    subject = serializers.CharField(required=False, allow_blank=True, default="")
    data = serializers.DictField(required=False, default=dict)  # type: ignore[assignment]  # the protocol's word

    def validate_data(self, data: dict[str, Any]) -> dict[str, Any]:
        """An event tells what has happened: a NUL in it, which PostgreSQL does not keep, must not hold up the others."""
        plain: dict[str, Any] = json.loads(json.dumps(data).replace("\\u0000", "\\ufffd"))
        return plain


class Row(serializers.ListField):
    """A fixed-length row such as `["m0001", "sleep", 12, 24, 0, "2026-..."]`; each column has its field."""

    def __init__(self, *columns: serializers.Field, **options: Any) -> None:
        self.columns = columns
        super().__init__(**options)

    def to_internal_value(self, data: Any) -> list[Any]:
        if not isinstance(data, list) or len(data) != len(self.columns):
            raise serializers.ValidationError(f"a row of {len(self.columns)} columns")
        return [None if v is None else c.run_validation(v) for c, v in zip(self.columns, data, strict=True)]


class SyncShape(serializers.Serializer):
    """Not strict: a newer agent may say more than we know."""

    boot = serializers.CharField(max_length=64)
    sequence = serializers.IntegerField(min_value=0, max_value=BIGINT)
    agent_time = serializers.DateTimeField()
    known_generation = serializers.IntegerField(required=False, default=0)
    known_safety = serializers.IntegerField(required=False, default=-1)
    wait_s = serializers.FloatField(required=False, default=0, min_value=0, max_value=30)
    inventory = serializers.DictField(required=False, allow_null=True, default=None)
    hosts = HostState(many=True, required=False)
    miners = serializers.ListField(
        child=Row(
            serializers.CharField(),
            serializers.CharField(allow_blank=True),
            serializers.IntegerField(min_value=0, max_value=BIGINT),
            serializers.IntegerField(min_value=0, max_value=INT),
            serializers.IntegerField(min_value=0, max_value=INT), serializers.DateTimeField(),
        ),
        required=False, default=list,
    )  # fmt: skip
    meters = serializers.ListField(
        child=Row(
            serializers.CharField(),
            serializers.IntegerField(min_value=0, max_value=BIGINT),
            serializers.DateTimeField(),
        ),
        required=False,
        default=list,
    )
    placements = PlacementState(many=True, required=False)
    events = EventShape(many=True, required=False)


class ChunkShape(serializers.Serializer):
    placement = PublicId("plc", source="pk")
    stream = serializers.ChoiceField(["stdout", "stderr"])
    offset = serializers.IntegerField(min_value=0)
    data = Output(max_length=1 << 20)  # type: ignore[assignment]  # as above


class LogsShape(Shape):
    chunks = ChunkShape(many=True)


class EnrolledShape(serializers.Serializer):
    agent = serializers.CharField()
    key = serializers.CharField(help_text="shown once")
    site = serializers.CharField()
    site_name = serializers.CharField()
    stream_url = serializers.CharField(help_text="where to sync")


class DesiredShape(serializers.Serializer):
    """What shall be at the site; the rows are explained in docs/agent-protocol.md."""

    server_time = serializers.DateTimeField()
    generation = serializers.IntegerField()
    lease_until = serializers.DateTimeField(
        help_text="granted work ends by itself before it, unless a sync moves it on"
    )
    acknowledged_sequence = serializers.IntegerField()
    acknowledged_events = serializers.ListField(child=serializers.CharField())
    mode = serializers.ChoiceField(Site.Mode.choices)
    inventory_wanted = serializers.BooleanField()
    placements = serializers.ListField(child=serializers.DictField())
    hosts = serializers.ListField(child=serializers.DictField())
    miners = serializers.ListField(child=serializers.ListField(), help_text="rows of name, mode, generation")
    safety = serializers.DictField(allow_null=True, help_text="null: as the agent knows it")


class NextShape(serializers.Serializer):
    placement = serializers.CharField()
    stream = serializers.ChoiceField(["stdout", "stderr"])
    next = serializers.IntegerField(help_text="the byte wanted next")
    offset = serializers.IntegerField(help_text="the same")


class NextsShape(serializers.Serializer):
    next = NextShape(many=True)


def sync(agent: Agent, body: Any, *, now: Any) -> dict[str, Any]:
    """One sync without waiting: take the report in, answer what shall be."""
    report = checked(body)
    wanted = agents.observe(agent, report, now=now)
    return agents.desired(agent, report, now=now, inventory_wanted=wanted)


def checked(body: Any) -> dict[str, Any]:
    shape = SyncShape(data=body)
    shape.is_valid(raise_exception=True)
    report: dict[str, Any] = shape.validated_data
    usable = [m for m in report["miners"] if m[3] is not None and m[5] is not None]
    report["miners"] = [[n, mode, g or 0, w, ghs or 0, at] for n, mode, g, w, ghs, at in usable]
    return report


class Enrol(APIView):
    authentication_classes = ()
    actions = {"POST": "public"}

    @extend_schema(tags=["agent"], request=EnrolShape, responses={201: EnrolledShape}, operation_id="agent_enrol")
    def post(self, request: Request) -> Response:
        shape = EnrolShape(data=request.data)
        shape.is_valid(raise_exception=True)
        agent, key = agents.enrol(**shape.validated_data, now=timezone.now())
        return Response(
            {
                "agent": agent.public_id,
                "key": key,
                "site": ids.encode("sit", agent.site_id),
                "site_name": agent.site.name,
                "stream_url": settings.STREAM_URL,
            },
            status=201,
        )


def unpacked(raw: bytes) -> bytes:
    """A gzipped body, at most MAX_BODY bytes packed or unpacked: a small body must not become a large one in our memory."""
    inflate = zlib.decompressobj(16 + zlib.MAX_WBITS)
    try:
        body = inflate.decompress(raw, MAX_BODY)
    except zlib.error as error:
        raise ParseError(f"The body is no gzip: {error}") from error
    if len(raw) > MAX_BODY or inflate.unconsumed_tail or not inflate.eof:
        raise ParseError(f"The body is larger than {MAX_BODY} bytes, or cut off.")
    return body


class MaybeGzipped(JSONParser):
    """JSON, or gzipped JSON: agents compress what is large."""

    def parse(self, stream: Any, media_type: Any = None, parser_context: Any = None) -> Any:
        request = (parser_context or {}).get("request")
        if request is not None and request.headers.get("Content-Encoding") == "gzip":
            stream = io.BytesIO(unpacked(stream.read(MAX_BODY + 1)))
        return super().parse(stream, media_type, parser_context)


class AgentView(APIView):
    authentication_classes = (AgentAuthentication,)
    parser_classes = (MaybeGzipped,)
    actions = {"POST": "agent"}

    @property
    def agent(self) -> Agent:
        """Whose key was sent: AgentAuthentication is the only way in."""
        return cast("Agent", self.request.user)


class Sync(AgentView):
    @extend_schema(tags=["agent"], request=SyncShape, responses={200: DesiredShape}, operation_id="agent_sync")
    def post(self, request: Request) -> Response:
        return Response(sync(self.agent, request.data, now=timezone.now()))


class Logs(AgentView):
    @extend_schema(tags=["agent"], request=LogsShape, responses={200: NextsShape}, operation_id="agent_logs")
    def post(self, request: Request) -> Response:
        shape = LogsShape(data=request.data)
        shape.is_valid(raise_exception=True)
        return Response({"next": agents.take_logs(self.agent, shape.validated_data["chunks"])})


def _routes() -> list[Any]:
    from django.urls import path

    return [
        path("agent/enrol", Enrol.as_view(), name="agent-enrol"),
        path("agent/sync", Sync.as_view(), name="agent-sync"),
        path("agent/logs", Logs.as_view(), name="agent-logs"),
    ]


urlpatterns = _routes()
