"""What changes a contract after it is signed, and the papers that both sides keep."""

from django.db import models
from django.db.models import Q

from marketplace.models.accounts import Organization, User
from marketplace.models.contracts import Contract
from marketplace.tenancy import TenantModel, TenantQuerySet


class OfContract(TenantQuerySet):
    tenant_paths = ("contract__organization", "contract__operator")


class DocumentFileQuerySet(TenantQuerySet):
    tenant_paths = ("document__contract__organization", "document__contract__operator")


class Amendment(TenantModel):
    """A change of a contract, proposed, then answered by its customer: a later end, more GPUs, another price.

    What it leaves as it is, is null. The contract's own columns say what holds now; accepted amendments say since when.
    """

    PREFIX = "amd"

    class Kind(models.TextChoices):
        EXTEND = "extend"
        RESIZE = "resize"
        PRICE = "price"

    class State(models.TextChoices):
        OPEN = "open"
        ACCEPTED = "accepted"
        DECLINED = "declined"
        EXPIRED = "expired"

    TRANSITIONS = {"open": {"accepted", "declined", "expired"}, "accepted": set(), "declined": set(), "expired": set()}

    contract = models.ForeignKey(Contract, on_delete=models.PROTECT, related_name="amendments")
    kind = models.CharField(max_length=8, choices=Kind)
    state = models.CharField(max_length=8, choices=State, default=State.OPEN)
    proposed_by = models.CharField(max_length=120)
    created_at = models.DateTimeField()
    answer_by = models.DateTimeField(help_text="it stands until then")
    effective_at = models.DateTimeField(help_text="from when on it counts")
    ends_at = models.DateTimeField(null=True, blank=True)
    added_gpus = models.PositiveIntegerField(default=0)
    price = models.BigIntegerField(null=True, blank=True, help_text="of what is added, or the new price of it all")
    old_ends_at = models.DateTimeField(null=True, blank=True)
    old_price = models.BigIntegerField(null=True, blank=True)
    total_minor = models.BigIntegerField(null=True, blank=True, help_text="what it adds to the commitment")
    reason = models.CharField(max_length=200, blank=True)
    decided_at = models.DateTimeField(null=True, blank=True)
    decided_by = models.CharField(max_length=120, blank=True)
    applied_at = models.DateTimeField(null=True, blank=True, help_text="since then the contract's own columns say it")

    objects = OfContract.as_manager()

    class Meta:
        constraints = [
            models.UniqueConstraint(
                fields=["contract"], condition=Q(kind="price", state="open"), name="amendment_one_open_price"
            ),
            models.CheckConstraint(
                condition=Q(state__in=("open", "accepted", "declined", "expired")), name="amendment_state"
            ),
            models.CheckConstraint(
                condition=Q(kind="extend", ends_at__isnull=False)
                | Q(kind="resize", added_gpus__gt=0, price__isnull=False)
                | Q(kind="price", price__isnull=False, old_price__isnull=False),
                name="amendment_says_what",
            ),
        ]
        indexes = [models.Index(fields=["answer_by"], condition=Q(state="open"), name="amendment_waiting")]

    def __str__(self) -> str:
        return f"{self.kind} of {self.contract_id}: {self.state}"


class TermsAcceptance(models.Model):
    """Append-only: who accepted which version of the terms of service for an organization, and when."""

    organization = models.ForeignKey(Organization, on_delete=models.PROTECT, related_name="terms_accepted")
    version = models.CharField(max_length=20)
    digest = models.CharField(max_length=64, help_text="SHA-256 of the text that was accepted")
    accepted_at = models.DateTimeField()
    accepted_by = models.CharField(max_length=120)
    user = models.ForeignKey(User, null=True, on_delete=models.PROTECT, related_name="+")

    objects = TenantQuerySet.as_manager()

    class Meta:
        constraints = [models.UniqueConstraint(fields=["organization", "version"], name="terms_accepted_once")]

    def __str__(self) -> str:
        return f"{self.organization_id}: {self.version}"


class ContractDocument(TenantModel):
    """Append-only: a paper of a contract as it was when both sides agreed, with its hash."""

    PREFIX = "doc"

    class Kind(models.TextChoices):
        ORDER_FORM = "order_form"
        AMENDMENT = "amendment"

    contract = models.ForeignKey(Contract, on_delete=models.PROTECT, related_name="documents")
    amendment = models.OneToOneField(Amendment, null=True, on_delete=models.PROTECT, related_name="document")
    kind = models.CharField(max_length=12, choices=Kind)
    title = models.CharField(max_length=160)
    html = models.TextField(help_text="the content, without a page around it")
    digest = models.CharField(max_length=64, help_text="SHA-256 of the HTML as UTF-8")
    created_at = models.DateTimeField()

    objects = OfContract.as_manager()

    class Meta:
        constraints = [
            models.UniqueConstraint(fields=["contract"], condition=Q(kind="order_form"), name="document_one_order_form")
        ]

    def __str__(self) -> str:
        return self.title


class DocumentFile(models.Model):
    """Append-only: a paper as a PDF file, made at its first download and kept as it was then."""

    document = models.OneToOneField(ContractDocument, primary_key=True, on_delete=models.PROTECT, related_name="file")
    body = models.BinaryField()
    digest = models.CharField(max_length=64, help_text="SHA-256 of the file")
    created_at = models.DateTimeField()

    objects = DocumentFileQuerySet.as_manager()

    def __str__(self) -> str:
        return f"{self.document.title}.pdf"
