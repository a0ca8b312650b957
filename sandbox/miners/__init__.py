"""A fleet of simulated LuxOS miners: JSON over TCP, one listening socket for all of 127.0.0.0/8.

The accepted connection's local address is the miner. `python -m sandbox.miners --count 100 --port 4028` runs a fleet
by itself; `sandbox.site` embeds one. The wire: a client sends one JSON object without a newline and need not close;
the answer is JSON, a NUL, and the end of the connection (with `keeps_open` the next request may follow). Commands: version config
profiles pools groups stats power logon curtail profileset (and session, logoff, reboot). Privileged parameters are "SESSION,argument".

Physics: the draw moves towards the mode's watts, down in a few seconds and up within a minute (divided by `speed`);
`true_w` is what the machine draws, `reading` what its firmware says.
"""

from sandbox.miners.fleet import BOOT_S, FAULTS, LIES, Fleet
from sandbox.miners.server import FleetServer

__all__ = ["BOOT_S", "FAULTS", "LIES", "Fleet", "FleetServer"]
