"""Scheduled work at a site: announced with its window, prepared for, done, and settled. The only writers of its tables.

reads       what is known: windows of hosts, of listings
"""

from marketplace.services.maintenance.reads import covers, upcoming

__all__ = ["covers", "upcoming"]
