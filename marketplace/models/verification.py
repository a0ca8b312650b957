"""Benchmarks that hosts have run, and what each host is taken for because of them. Written by services.verifications alone."""

from django.db import models
from django.db.models import Q

from marketplace.models.jobs import Job
from marketplace.models.reliability import OfHostQuerySet
from marketplace.models.sites import Host
from marketplace.tenancy import TenantModel


class Verification(TenantModel):
    """One run on one host: a job of our own that takes all of its GPUs for some minutes, and the figures that it printed."""

    PREFIX = "vrf"

    class State(models.TextChoices):
        RUNNING = "running"
        PASSED = "passed"
        FAILED = "failed"
        ABORTED = "aborted"

    host = models.ForeignKey(Host, on_delete=models.CASCADE, related_name="verifications")
    job = models.OneToOneField(Job, on_delete=models.PROTECT, related_name="verification")
    state = models.CharField(max_length=8, choices=State, default=State.RUNNING)
    reason = models.CharField(max_length=1000, blank=True, help_text="what fell short, and what to look at")
    asked_by = models.CharField(max_length=120)
    started_at = models.DateTimeField()
    finished_at = models.DateTimeField(null=True, blank=True)
    gpu_model = models.CharField(max_length=40)
    fingerprint = models.CharField(max_length=32, help_text="of the devices that were stated")
    gpus = models.PositiveSmallIntegerField(default=0, help_text="that answered")
    matmul_gflops = models.BigIntegerField(default=0, help_text="slowest GPU")
    memory_mb_s = models.BigIntegerField(default=0, help_text="slowest GPU")
    fabric_mb_s = models.BigIntegerField(default=0, help_text="slowest link between GPUs, one direction; 0: none")
    disk_write_mb_s = models.BigIntegerField(default=0)
    disk_read_mb_s = models.BigIntegerField(default=0)
    network_down_kb_s = models.BigIntegerField(default=0)
    network_up_kb_s = models.BigIntegerField(default=0)
    score = models.PositiveIntegerField(default=0)

    objects = OfHostQuerySet.as_manager()

    class Meta:
        constraints = [
            models.UniqueConstraint(fields=["host"], condition=Q(state="running"), name="verification_one_at_a_time"),
            models.CheckConstraint(
                condition=Q(state="running", finished_at__isnull=True)
                | (~Q(state="running") & Q(finished_at__isnull=False)),
                name="verification_finished",
            ),
        ]
        indexes = [
            models.Index(fields=["host", "-id"], name="verification_of_host"),
            models.Index(fields=["id"], condition=Q(state="running"), name="verification_running"),
        ]

    def __str__(self) -> str:
        return f"{self.host} {self.state}"


class HostVerification(models.Model):
    """What a host is taken for. `verified` until it is stale, or has failed twice in a row."""

    class State(models.TextChoices):
        UNVERIFIED = "unverified"
        VERIFIED = "verified"
        STALE = "stale"
        FAILED = "failed"

    host = models.OneToOneField(Host, on_delete=models.CASCADE, related_name="verification")
    state = models.CharField(max_length=10, choices=State, default=State.UNVERIFIED)
    score = models.PositiveIntegerField(default=0, help_text="of the run that verified it; 1000: an H100-SXM")
    verified_at = models.DateTimeField(null=True, blank=True)
    run = models.ForeignKey(
        Verification, null=True, on_delete=models.SET_NULL, related_name="+", help_text="that verified it"
    )
    failures = models.PositiveSmallIntegerField(default=0, help_text="runs in a row that failed")
    next_at = models.DateTimeField(help_text="not before then by itself")
    waits_for = models.CharField(max_length=200, blank=True, help_text="why a run that is due has not begun")
    fingerprint = models.CharField(max_length=32, blank=True, help_text="of the devices that were verified")

    class Meta:
        indexes = [models.Index(fields=["next_at"], name="verification_due")]

    def __str__(self) -> str:
        return f"{self.host} {self.state}"
