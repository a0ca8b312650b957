"""The power soak: a site with physics of its own, our real control loop and the agent's safety loop, and everything that goes wrong.

`make soak-power` runs it for ten minutes of a machine's time, in which half a day passes at the site: jobs come and go, grid calls come,
and every row of the failure table of docs/power.md strikes, again and again, two or three at once. No breaker may trip, nothing may be
granted on a sleep that did not happen, and when the faults stop everything must come back to where it was.
"""
