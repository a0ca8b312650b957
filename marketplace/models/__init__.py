"""All tables but scheduling records (scheduler.models) and money (billing.models)."""

from marketplace.models.accounts import (
    ApiKey,
    AuditEvent,
    BillingStanding,
    Invitation,
    Membership,
    Organization,
    User,
)
from marketplace.models.agreements import Amendment, ContractDocument, DocumentFile, TermsAcceptance
from marketplace.models.contracts import Contract, ContractEvent, Reservation, ReservationBlock
from marketplace.models.conversions import ConversionPlan
from marketplace.models.energy import DeviceHour, PoolFeed, ProfitHour, Receipt
from marketplace.models.forward import Fill, Resale, StandingBid
from marketplace.models.grid import CurtailmentNotice, CurtailmentReport, GridSource, HeldLower
from marketplace.models.jobs import Job, JobEvent
from marketplace.models.limits import Budget, OrganizationSlice
from marketplace.models.listings import Kind, Listing, OfferChange, OfferFloor, Quote
from marketplace.models.maintenance import (
    CalendarFeed,
    Maintenance,
    MaintenanceHost,
    MaintenanceNotice,
    Shortfall,
)
from marketplace.models.outbox import IdempotencyKey, OutboxMessage
from marketplace.models.placements import LogChunk, Placement, PlacementEvent
from marketplace.models.power import (
    Curtailment,
    FeedValue,
    MeterReading,
    NodeResidual,
    PowerFreeze,
    PowerGrant,
    ShedBatch,
    ShedClaim,
    SiteMinute,
)
from marketplace.models.reliability import GpuError, HostCondition, HostDay, Reliability
from marketplace.models.saved import SavedMatch, SavedMoment, SavedSearch
from marketplace.models.screening import BusinessProfile, Screening, ScreeningEvent
from marketplace.models.sites import (
    Agent,
    AgentEvent,
    Cell,
    ControlPulse,
    EnrolmentToken,
    Gpu,
    GpuModel,
    Host,
    Miner,
    PowerNode,
    Site,
)
from marketplace.models.spot import SpotInterval, SpotNotice, SpotResult
from marketplace.models.verification import HostVerification, Verification

__all__ = [
    "Agent",
    "AgentEvent",
    "Amendment",
    "ApiKey",
    "AuditEvent",
    "BillingStanding",
    "Budget",
    "BusinessProfile",
    "CalendarFeed",
    "Cell",
    "Contract",
    "ContractDocument",
    "ContractEvent",
    "ControlPulse",
    "ConversionPlan",
    "Curtailment",
    "CurtailmentNotice",
    "CurtailmentReport",
    "DeviceHour",
    "DocumentFile",
    "EnrolmentToken",
    "FeedValue",
    "Fill",
    "Gpu",
    "GpuError",
    "GpuModel",
    "GridSource",
    "HeldLower",
    "Host",
    "HostCondition",
    "HostDay",
    "HostVerification",
    "IdempotencyKey",
    "Invitation",
    "Job",
    "JobEvent",
    "Kind",
    "Listing",
    "LogChunk",
    "Maintenance",
    "MaintenanceHost",
    "MaintenanceNotice",
    "Membership",
    "MeterReading",
    "Miner",
    "NodeResidual",
    "OfferChange",
    "OfferFloor",
    "Organization",
    "OrganizationSlice",
    "OutboxMessage",
    "Placement",
    "PlacementEvent",
    "PoolFeed",
    "PowerFreeze",
    "PowerGrant",
    "PowerNode",
    "ProfitHour",
    "Quote",
    "Receipt",
    "Reliability",
    "Resale",
    "Reservation",
    "ReservationBlock",
    "SavedMatch",
    "SavedMoment",
    "SavedSearch",
    "Screening",
    "ScreeningEvent",
    "ShedBatch",
    "ShedClaim",
    "Shortfall",
    "Site",
    "SiteMinute",
    "SpotInterval",
    "SpotNotice",
    "SpotResult",
    "StandingBid",
    "TermsAcceptance",
    "User",
    "Verification",
]
