"""What an organization may hold at once, shared out over the cells that place for it."""

from django.db import models

from marketplace.models.accounts import Organization
from marketplace.models.sites import Cell


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
