"""Custom transforms: a user's function over (event, table), run by Faust (extra `transforms`).

A process of its own. Two stages, both on Kafka:

1. The feed, on the kit's runner: events of all inputs of a transform go to one internal topic,
   keyed by the field that its tables go by. So there is one order for all of them, also when the
   log is read again.
2. The tables, on Faust: it shares out the partitions, brings the tables back from their changelog,
   and calls one agent a transform, one event after another.

What holds when a process is killed, which Faust alone does not give (its table updates, its offsets
and what an agent sends are three writes):

- What an event leads to is sent first, then the tables of the batch and the position behind them,
  in one batch of the changelog topic. Reading goes on after *that* position; the group's offsets
  only show the lag.
- A table is stored with the causes applied to it, by source. An event at or below them is a replay
  and is not applied again.
- A partition is claimed in the position store; a process that was replaced while it was paused
  finds its claim gone, and stores nothing. What slips through between that look and the write is
  undone by taking the higher position of two rows when tables are brought back.
- An event's id is made from its cause. So what is sent again after a crash is what was sent, and
  its readers' marks drop it.

A function must be a pure function of the event and the table for that.
"""
