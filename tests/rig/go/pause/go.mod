module tuneyard.io/tests/rig/pause

go 1.24
