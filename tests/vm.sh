#!/usr/bin/env bash
# The machines of scripts/vm say how they ended, and the scenarios in tests/vm hold in them.
set -euo pipefail
BUILT=debug
# shellcheck source=../scripts/lib.sh
. "$(dirname "$(readlink -f "$0")")/../scripts/lib.sh"

need_root
[ -x "$FIRSTREAD" ] || die "$FIRSTREAD is missing: cargo build"
export FIRSTREAD
begin vm

ends() { # EXPECTED COMMAND [OPTION…]: a machine that runs the command ends with this code
    local expected=$1 rc=0
    printf '#!/bin/bash\n%s\n' "$2" >"$WORK/script"
    chmod 755 "$WORK/script"
    "$REPO/scripts/vm" run "${@:3}" "$WORK/script" >"$LOGS/machine.log" 2>&1 || rc=$?
    [ "$rc" = "$expected" ] || die "a machine that runs '$2' ended with $rc, not $expected; see $LOGS/machine.log"
}
ends 0 true
ends 3 'exit 3'
ends 124 'sleep 60' --time 3
ends 125 'perl -e "syscall(169, 0xfee1dead, 672274793, 0x4321fedc, 0)"' --time 20
echo "machines: exit codes, time limit and death are told"

"$REPO/scripts/vm" test
