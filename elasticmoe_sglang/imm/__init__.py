"""[5] IMM (Instance Management Module): keeps standby processes and puts one into a rank when asked.

Receives `Assign` from the coordinator (and, at launch, from SGLang's data-parallel controller); hands over a process
that has SGLang imported already. It is the parent of the ranks, so a rank's crash ends at the IMM and is reported,
never delivered to the server as a signal. Its own end is nobody's but its standbys'.
"""
