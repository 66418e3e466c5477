# shellcheck shell=bash
# Measurements in rounds, and what is made of them. They are lines of JSON in the file $figures.

# record ROUND CASE WHAT IOPS
record() {
  jq -nc --argjson round "$1" --arg case "$2" --arg what "$3" --argjson iops "$4" '$ARGS.named' >>"${figures:?}"
  printf '  round %d: %-34s %-12s %9.0f\n' "$1" "$2" "$3" "$4" >&2
}

# fio_iops FILE RW BLOCK_SIZE DEPTH SECONDS [OPTION...]: requests per second of direct I/O.
fio_iops() { fio_said "${@:1:5}" '.read.iops + .write.iops' "${@:6}"; }

# fio_said FILE RW BLOCK_SIZE DEPTH SECONDS FIGURE [OPTION...]: a figure of what fio says of its job.
fio_said() {
  local said status=0
  said=$(mktemp)
  fio --name=bench --filename="$1" --rw="$2" --bs="$3" --iodepth="$4" --runtime="$5" --time_based \
    --ioengine=libaio --direct=1 --randrepeat=0 --output-format=json --output="$said" "${@:7}" >&2 || status=1
  ((status)) || jq -e ".jobs[0] | if .error == 0 then $6 else error(\"I/O error \\(.error)\") end" "$said" || status=1
  rm -f "$said"
  return "$status"
}

# summarise SUBJECTS PEERS: JSON with median, least and most of each figure, and of the ratios of subjects to peers. These are
# ratios within a round, so that what slows a machine down for a while slows both sides. Arguments are words with spaces between.
summarise() {
  jq -s --arg subjects "$1" --arg peers "$2" '
    def spread: sort | { median: ((.[(length - 1) / 2 | floor] + .[length / 2 | floor]) / 2), least: .[0], most: .[-1] };
    ($subjects / " ") as $subjects | ($peers / " ") as $peers | . as $rows
    | reduce $rows[].case as $case ([]; if index([$case]) then . else . + [$case] end)
    | map(. as $case | [$rows[] | select(.case == $case)] as $rows | {
        case: $case,
        iops: [($subjects + $peers)[] as $what | { what: $what } + ([$rows[] | select(.what == $what).iops] | spread)],
        ratios: [
          $subjects[] as $subject | $peers[] as $peer
          | { what: $subject, to: $peer } + (
              [ $rows[] | select(.what == $subject) as $one | $rows[] | select(.what == $peer and .round == $one.round) | $one.iops / .iops ]
              | spread)
        ]
      })' "${figures:?}"
}

# show_iops, show_ratios: a table of a summary on the standard input.
show_iops() {
  jq -r '
    def figure: "\(.median | round) [\(.least | round)-\(.most | round)]";
    (["IOPS"] + [.[0].iops[].what]), (.[] | [.case] + [.iops[] | figure]) | @tsv' | align
}
show_ratios() {
  jq -r '
    def hundredths: (. * 100 | round) as $all | "\($all / 100 | floor).\($all % 100 | tostring | if length < 2 then "0" + . else . end)";
    def figure: "\(.median | hundredths) [\(.least | hundredths)-\(.most | hundredths)]";
    (["RATIO"] + [.[0].ratios[] | "\(.what)/\(.to)"]), (.[] | [.case] + [.ratios[] | figure]) | @tsv' | align
}

# align: makes columns of lines with tabs.
align() {
  awk -F '\t' '
    { for (i = 1; i <= NF; i++) { cell[NR, i] = $i; if (length($i) > width[i]) width[i] = length($i) } fields = NF }
    END { for (row = 1; row <= NR; row++) { for (i = 1; i <= fields; i++) printf "%-*s%s", width[i], cell[row, i], i < fields ? "  " : "\n" } }'
}
