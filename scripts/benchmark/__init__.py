"""The benchmark: how fast imapfs is, measured beside what a person would use in its place.

`rows` has what is measured, one function a row; `bench` what the rows use: the server, the mail, mounts and
the other programs; `link` the network between; `results` what came out and whether a goal was met; `report`
how that is shown.
"""
