#!/bin/bash
# vm: --time 400
# What ublk-kill.sh does, for the transport nbd: there a kill is a pause of up to `nbd.timeout` for what was on its way.
export FIRSTREAD_NBD_TIMEOUT=1
KILLS=${KILLS:-50} TRANSPORT=nbd
. "$REPO/tests/vm/ublk-kill.sh"
