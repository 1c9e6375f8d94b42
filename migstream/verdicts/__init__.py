"""What a target makes of each saved register, and whether a guest would notice: rules as data, judged on values.

`model` has the words, `facts` what the rules ask of a saved guest and a host, `arm64` and `x86_64` the rows, `judge`
takes them in order, `policy` is the operator's say. No file, socket or clock; nothing here touches a VM.
"""
