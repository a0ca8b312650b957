"""What an organization may hold at once, shared out over the cells that place for it; and what it may spend."""

from django.db import models

from marketplace.models.accounts import Organization
from marketplace.models.sites import Cell
from marketplace.tenancy import TenantModel, TenantQuerySet


class OrganizationSlice(models.Model):
    """The part of an organization's GPU limit that one cell may fill by itself; what its slices come to, the limit holds.

    Written by services.slices, under the organization's lock.
    """

    organization = models.ForeignKey(Organization, on_delete=models.CASCADE, related_name="slices", db_index=False)
    cell = models.ForeignKey(Cell, on_delete=models.CASCADE, related_name="+", db_index=False)
    milli = models.BigIntegerField(help_text="milli-GPU that its live placements in the cell may hold at once")

    class Meta:
        constraints = [
            models.UniqueConstraint(fields=["organization", "cell"], name="slice_once"),
            models.CheckConstraint(condition=models.Q(milli__gte=0), name="slice_not_negative"),
        ]

    def __str__(self) -> str:
        return f"{self.organization} in {self.cell}: {self.milli} milli-GPU"


class Budget(TenantModel):
    """What an organization allows itself to spend, in minor units of its currency, and where it stands in the month.

    The limits are its own people's (services.spending.set_limits), the spend is billing's (services.spending.record_spend).
    """

    PREFIX = "bud"

    organization = models.OneToOneField(Organization, primary_key=True, on_delete=models.CASCADE, related_name="budget")
    hourly_minor = models.PositiveBigIntegerField(
        null=True, blank=True, help_text="most that running work paid by use may cost an hour"
    )
    monthly_minor = models.PositiveBigIntegerField(
        null=True, blank=True, help_text="most that a UTC month should come to"
    )
    month = models.DateField(null=True, help_text="first day of the UTC month that was measured")
    spent_minor = models.BigIntegerField(default=0, help_text="in that month, by then")
    measured_at = models.DateTimeField(null=True)
    told_percent = models.PositiveSmallIntegerField(default=0, help_text="highest step of which its people were told")
    changed_at = models.DateTimeField()

    objects = TenantQuerySet.as_manager()

    def __str__(self) -> str:
        return f"budget of {self.organization}"
