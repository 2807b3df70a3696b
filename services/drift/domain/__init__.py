"""Drift of one model version, measured over whole event-time days.

Everything here is pure: no I/O and no clock. The counts of batches add up to the counts of a day
however it was cut into batches; a day's reports are a function of its counts and labelled scores.

Bins
    `n` rising inner edges make `n + 1` bins, and NaN has one more at the end. Bin 0 holds
    `x <= edges[0]`, bin `k` holds `edges[k-1] < x <= edges[k]`, bin `n` holds `x > edges[n-1]`;
    this is `numpy.searchsorted(edges, x, side="left")`. Infinities fall into the outer bins.

Days
    The day of a prediction is the UTC date of its `occurred_at`, never of the wall clock.

Undefined measures
    A measure without the records it needs (no labels, one class only, an empty day) is NaN, and
    NaN is never reported, so it can neither alert nor hide an alert of another day.
"""
