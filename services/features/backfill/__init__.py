"""Computing the past of a view that is new to a partition which has read its events already.

`book` keeps what a partition knows of it, as part of its checkpoint; `filling` is the state over
the past's events; `history` reads them from the lake and the log; `running` is the task that does
all that beside the stages. docs/adr/0013-backfill.md says why it is right.
"""
