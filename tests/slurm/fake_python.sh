#!/bin/bash
# The interpreter of a cluster file whose ranks shall be slurm_rank.py: everything else is Python as usual.
here=$(dirname "$0")
arguments=()
while (($#)); do
  case "$1 ${2:-} ${3:-}" in
    "-m trichord_launch.node "*) arguments+=("$here/slurm_node.py"); shift 2 ;;
    "-m trichord.cli train") arguments+=("$here/slurm_rank.py" finish "${FAKE_STEP_S:-0.05}"); shift 3 ;;
    *) arguments+=("$1"); shift ;;
  esac
done
exec python "${arguments[@]}"
