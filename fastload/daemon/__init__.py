"""The warmer daemon: a directory's service that stays, with jobs that keep in its cache what is needed there.

`config` is what it is told, `schedule` decides what runs when, `jobs` is what becomes of each job. `supervisor` runs
them beside the service, in its loop; `job` is the child process that warms for one of them, an ordinary consumer.
`views` keeps the page and metrics running, `systemd` talks to the init system, and `submission` to a daemon that runs.
"""
