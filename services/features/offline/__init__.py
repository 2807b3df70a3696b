"""Training sets: what the stream answered, worked out again from the lake.

A batch engine answers (entity, as-of time) pairs from the events in the lake, by the definitions of
the views and by code of its own, so that each holds the other to them: the tests compare the two
bit for bit.

Promised
    For a replayed request the batch engine's answer is the stream's, bit for bit, sketches
    included, whatever the order in which events came, how often the stream was restarted and what
    was corrected. What came late for a view is on features.late.v1: what it did not take is left
    out of its features here too, as is what it could not take; what it took counts for as-of times
    after that up to which events had been applied.

Not promised
    Each partition of a broadcast view judges for itself what is late: where they differ, this is
    the answer of the one that has the number of the event's partition. A replayed request that came
    late may hold events after its slice. A live request is answered with what had arrived, which
    may be less, or more of its own tile.
"""
