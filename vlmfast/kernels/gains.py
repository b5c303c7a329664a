"""When a gain of the greedy choices counts as spent, and the units in which whole ones are summed; see `greedy`."""

SPENT = 1e-5
UNIT = 2.0**58  # coverage is summed as int64 in units of 2**-58: exact, so that every device has the same sums
SHARE = 100_000  # 1 / SPENT, for gains in whole units
