"""Plans to convert a mining site to AI, each kept with what it was made from."""

from django.db import models

from marketplace.models.sites import Site, SiteOwnedQuerySet
from marketplace.tenancy import TenantModel


class ConversionPlan(TenantModel):
    """Never changed once made: who wants other inputs makes another. Cents of US dollars; estimates are said to be such."""

    PREFIX = "cnv"

    site = models.ForeignKey(Site, on_delete=models.CASCADE, related_name="conversion_plans")
    name = models.CharField(max_length=80)
    given = models.JSONField(help_text="the inputs as they were given")
    used = models.JSONField(help_text="the inputs with what was assumed or read off the site")
    assumptions = models.JSONField(help_text="each value used, with source, date and confidence")
    outcome = models.JSONField(help_text="halls, months, sensitivity")
    npv_cents = models.BigIntegerField()
    npv_hashing_on_cents = models.BigIntegerField()
    irr_permille = models.IntegerField(null=True, blank=True)
    payback_months = models.PositiveIntegerField(null=True, blank=True)
    capital_cents = models.BigIntegerField()
    created_by = models.CharField(max_length=120)
    created_at = models.DateTimeField()

    objects = SiteOwnedQuerySet.as_manager()

    class Meta:
        indexes = [models.Index(fields=["site", "-id"], name="conversion_of_site")]

    def __str__(self) -> str:
        return self.name

    @property
    def gain_cents(self) -> int:
        """More than hashing on is worth."""
        return self.npv_cents - self.npv_hashing_on_cents
