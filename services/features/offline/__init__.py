"""Training sets: what the stream answered, worked out again from the lake.

A batch engine answers (entity, as-of time) pairs from the events in the lake, by the definitions of
the views and by code of its own, so that each holds the other to them: the tests compare the two
bit for bit.

Promised
    For a replayed request the batch engine's answer is the stream's, bit for bit, sketches
    included, whatever the order in which events came, how often the stream was restarted and what
    was corrected. An event that came too late for a view, so that it is on features.late.v1, is
    left out of its features here too; so is one that a view could not take.

Not promised
    A late event that the view still took counts for every as-of time after its own; the stream had
    it from its arrival on. A view with `lateness: 0` has no such events. Each process of a
    broadcast view judges for itself what is late: where they differ, this is the answer of one.
    A live request is answered with what had arrived, which may be less, or more of its own tile.
"""
