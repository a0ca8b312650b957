"""Which halls of a mining site to convert to AI, and when: months, megawatts, cash.

    inputs.Site -> schedule.plan(site) -> months.Outcome; sensitivity.tornado(site, starts)

Pure. Power is integer watts at the meter unless a name says otherwise, energy prices uUSD per MWh and hashprice uUSD per PH/s per
day as in `economics`, cash integer cents a month, each line of a month rounded once (half away from zero). Rates of return, net
present values and paybacks are estimates: floats, of the rounded cash.

A hall goes through four phases. Permit and long-lead orders run side by side from its start, and it hashes on meanwhile (the
*hashing bridge*); then it is built and commissioned, and neither hashes nor earns; then it is live. Capital is paid as a deposit with
the order and in equal parts over the building. A live hall fills over `ramp_months`; what its racks leave of its power goes to the
miners that were kept beside them, the most efficient first, while a machine earns more than its energy costs. Miners that are not
kept are sold when the building begins.

Which hall starts when is chosen by net present value over the horizon: at most `crews` halls are built or commissioned at a time, and
no more capital is spent than there is. The choice is exact (`schedule.best`). A live hall earns for its term
(a lease's); nothing is assumed to be worth anything after the horizon.
"""
