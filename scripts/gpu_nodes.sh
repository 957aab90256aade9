# shellcheck shell=bash
# GPU node lists: which GPUs of which machines a run takes, and the commands that start it there.  Wrappers source it.
#
#   localhost                      all GPUs of this machine
#   localhost:1,2                  slots 1 and 2 of it, in that order
#   node1:0,1@node2:0,1            two machines, two GPUs each, as DeepSpeed writes it
#   node1:0,1,node2:0,1            the same
#   node1@node2                    all GPUs of both
#
# Where CUDA_VISIBLE_DEVICES is set already, slots of this machine count within it: slot 1 of CUDA_VISIBLE_DEVICES=4,6 is
# GPU 6.  A name that is not this machine's is another machine: its command is printed (of several machines this one's,
# too), to be run there in a folder like this one, or with LAUNCH=ssh started over ssh in the folder of this name.
#
#   LAUNCHER=torchrun|deepspeed|python   default: torchrun for more than one GPU, else python
#   LAUNCH=print|ssh                     what to do with the commands for other machines
#   RDZV_PORT=29400                      where machines meet: a free port of the first one; another for another run
#   HOSTFILE=FILE                        deepspeed's, for several machines (its own default is /job/hostfile)
#
#   read_flags "$@"                      sets flags, the words without --dry-run, and dry_run where it was among them;
#                                        --help shows the wrapper's first lines, and ends
#   read_ranks [N] [FLAG]...             the same from the words of a wrapper that takes N GPUs, or GPU_NODES; sets flags
#   read_gpu_nodes "$GPU_NODES"          sets node_count, node_hosts, node_devices, per_node, gpus and launcher
#   log_to FILE                          from here on all output goes to a file as well, at its end
#   on_nodes SCRIPT [FLAG]...            runs it there, or prints the exact commands

# fail SENTENCE: a user's mistake, exit code 2.
fail() {
  echo "${0##*/}: $1" >&2
  exit 2
}

# read_flags [WORD]...: what a wrapper was called with.  No word takes a GPU, or .venv, to be read.
read_flags() {
  local word
  dry_run="" flags=()
  for word in "$@"; do
    case $word in
      --dry-run) dry_run=1 ;;
      -h | --help) show_help ;;
      *) flags+=("$word") ;;
    esac
  done
}

# show_help: the comment that the wrapper begins with.  Ends the wrapper, which has gone to the project's folder.
show_help() {
  local file=${0##*/}
  if [ ! -e "$file" ]; then file=scripts/$file; fi
  sed -n -e 1d -e '/^[^#]/q' -e 's/^# \{0,1\}//p' "$file"
  exit
}

# set_line WORD...: sets line, the words as a shell reads them back; bare where nothing in them needs quotes.
set_line() {
  local word name rest apart=""
  line=""
  for word in "$@"; do
    line=$line$apart apart=" " rest=$word
    name=${word%%=*}
    case $name in
      "$word" | "" | *[!A-Za-z0-9_]*) ;;
      *) line=$line$name= rest=${word#*=} ;; # NAME='a value' is still an assignment
    esac
    case $rest in
      "" | *[!A-Za-z0-9_@%+=:,./-]*)
        line="$line'"
        while [ "$rest" != "${rest#*\'}" ]; do
          line="$line${rest%%\'*}'\\''" rest=${rest#*\'}
        done
        line="$line$rest'"
        ;;
      *) line=$line$rest ;;
    esac
  done
}

# -- reading a list ----------------------------------------------------------------------------------------------------

# count_gpus: sets gpus, how many GPUs this machine offers ("": there are some, and nothing here counts them), and visible,
# those of CUDA_VISIBLE_DEVICES where it is set.  As in CUDA, what stands behind an empty entry or -1 does not count.
count_gpus() {
  local rest first device
  gpus=0 visible=()
  if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
    rest=${CUDA_VISIBLE_DEVICES// /},
    while first=${rest%%,*} && [ -n "$first" ] && [ "$first" != -1 ]; do
      visible[gpus]=$first
      gpus=$((gpus + 1)) rest=${rest#*,}
    done
  elif command -v nvidia-smi >/dev/null; then
    gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU ') || true
  else # a container without nvidia-smi, ROCm, WSL
    for device in /dev/nvidia[0-9]* /dev/kfd /dev/dxg; do
      if [ -e "$device" ]; then gpus=""; fi
    done
  fi
}

# wants_cpu: whether the run was told to stay on the CPU.
wants_cpu() {
  case " ${flags[*]-} " in *" --device cpu "* | *" --device=cpu "*) return 0 ;; *) return 1 ;; esac
}

# is_here HOST: whether it is this machine.
is_here() {
  case $1 in
    localhost | 127.0.0.1 | "$HOSTNAME" | "${HOSTNAME%%.*}") return 0 ;;
    *) return 1 ;;
  esac
}

# add_host HOST: a further node, all of whose GPUs are taken until add_slot names some.
add_host() {
  local node
  case $1 in
    "") fail "GPU_NODES $list has an empty host: write localhost:0,1 or node1:0,1@node2:0,1" ;;
    [!A-Za-z0-9]*) fail "GPU_NODES $list: a host does not begin as $1 does" ;;
    *[!0-9]*) ;;
    *) fail "GPU_NODES $list: $1 is a number where a host has to stand, as in localhost:$1" ;;
  esac
  for ((node = 0; node < node_count; node++)); do
    if [ "${node_hosts[node]}" = "$1" ]; then fail "GPU_NODES $list has $1 twice: name all its slots at once"; fi
  done
  node_hosts[node_count]=$1 node_slots[node_count]="" node_devices[node_count]="" node_sizes[node_count]=0
  node_count=$((node_count + 1))
}

# add_slot SLOT: a further GPU of the node that was added last.
add_slot() {
  local last=$((node_count - 1)) device=$1 host=${node_hosts[node_count - 1]}
  case $1 in
    "") fail "GPU_NODES $list: $host has an empty slot: write $host:0,1, or $host for all of its GPUs" ;;
    *[!0-9]* | 0?* | ?????*) fail "GPU_NODES $list: $1 is no slot of $host: slots are numbers, as in $host:0,1" ;;
  esac
  case ,${node_slots[last]}, in *",$1,"*) fail "GPU_NODES $list has slot $1 of $host twice" ;; esac
  if is_here "$host" && [ "${gpus:-0}" != 0 ]; then # without any, check_launcher says so
    if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
      [ "$1" -lt "$gpus" ] ||
        fail "GPU_NODES $list: slot $1 is beyond the $gpus GPUs of CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES (from 0)"
      device=${visible[$1]}
    else
      [ "$1" -lt "$gpus" ] || fail "GPU_NODES $list: slot $1 is beyond the $gpus GPUs that nvidia-smi counts (from 0)"
    fi
  fi
  node_slots[last]=${node_slots[last]:+${node_slots[last]},}$1
  node_devices[last]=${node_devices[last]:+${node_devices[last]},}$device
  node_sizes[last]=$((node_sizes[last] + 1))
}

# read_gpu_nodes LIST: sets, for node 0, 1, ...: node_hosts, node_slots (as given; "": all), node_devices (what
# CUDA_VISIBLE_DEVICES has to be there; "": leave it), and node_count, per_node (processes; gpu: as many as GPUs), gpus.
read_gpu_nodes() {
  local list=$1 rest left token bare node
  node_count=0 node_hosts=() node_slots=() node_devices=() node_sizes=()
  count_gpus
  case $list in
    "") fail "GPU_NODES is empty: write localhost for all GPUs of this machine, or localhost:0,1" ;;
    *[[:space:]]*) fail "GPU_NODES '$list' has a space: write localhost:0,1 or node1:0,1@node2:0,1" ;;
    *"["* | *"]"* | *::*) fail "GPU_NODES $list: an IPv6 address cannot be told from slots: use the host's name" ;;
    *[!A-Za-z0-9._,:@-]*) fail "GPU_NODES '$list' is no list of hosts and slots, as in localhost:0,1" ;;
  esac
  rest=$list@
  while [ -n "$rest" ]; do
    left=${rest%%@*}, rest=${rest#*@} bare=:
    while [ -n "$left" ]; do
      token=${left%%,*} left=${left#*,}
      case $token in
        *:*:*) fail "GPU_NODES $list: $token has two colons: ports and IPv6 addresses have no place in it" ;;
        *:*)
          add_host "${token%%:*}"
          add_slot "${token#*:}"
          bare=""
          ;;
        *)
          case $bare in
            :) # the first word of a node
              add_host "$token"
              bare=$token
              ;;
            "") add_slot "$token" ;;
            *) fail "GPU_NODES $list: write $bare:$token for a slot, $bare@$token for two hosts" ;;
          esac
          ;;
      esac
    done
  done
  per_node=${node_sizes[0]}
  for ((node = 0; node < node_count; node++)); do
    case $node_count:${node_hosts[node]} in
      1:*) ;;
      *:localhost | *:127.0.0.1) fail "GPU_NODES $list: ${node_hosts[node]} is another machine on each: use its name" ;;
    esac
    if [ "${node_sizes[node]}" != "$per_node" ]; then
      fail "GPU_NODES $list: every node has to have as many slots as ${node_hosts[0]}, or none has any (all GPUs)"
    fi
  done
  if [ "$per_node" = 0 ]; then # all of them
    per_node=gpu
    if [ "$node_count" = 1 ] && is_here "${node_hosts[0]}"; then
      per_node=${gpus:-0}
      for ((node = 0; node < per_node; node++)); do
        node_devices[0]=${node_devices[0]:+${node_devices[0]},}${visible[node]:-$node}
      done
      if [ "$per_node" = 0 ]; then per_node=1; fi # a CPU
    fi
  fi
  check_launcher
}

# read_ranks [N] [FLAG]...: sets flags, and reads the first N GPUs of this machine as a list, or GPU_NODES where there
# is no N.  Without GPUs N is processes on the CPU, and that has to be said: --device cpu.
read_ranks() {
  local n="" given="" slot list=localhost: counter=nvidia-smi
  case ${1---} in
    -[0-9]* | [!-]* | "") given=1 n=$1 && shift ;;
  esac
  flags=("$@")
  if [ -z "$given" ]; then
    [ -n "${GPU_NODES:-}" ] || fail "say on how many GPUs, a number, or on which, GPU_NODES=localhost:0,1"
    read_gpu_nodes "$GPU_NODES"
    return
  fi
  [ -z "${GPU_NODES:-}" ] || fail "N is $n, and GPU_NODES=$GPU_NODES is set too: which GPUs? leave one of them out"
  case $n in
    "" | *[!0-9]* | 0* | ?????*) fail "N is a number of GPUs, 1 or more, and not '$n'" ;;
  esac
  count_gpus
  if wants_cpu; then
    list="of $n processes" node_count=1 node_hosts=(localhost) node_slots=("") node_devices=("") per_node=$n
    check_launcher
    return
  fi
  case ${dry_run:-}${gpus:-none} in
    0) fail "$no_gpu: add --device cpu for N=$n processes on the CPU" ;;
    none)
      fail "no nvidia-smi counts GPUs here: name them, GPU_NODES=localhost:0,1, or add --device cpu for N=$n processes"
      ;;
  esac
  if [ "${gpus:-0}" != 0 ] && [ "$n" -gt "$gpus" ]; then
    if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then counter=CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES; fi
    fail "N is $n, and $counter counts $gpus GPUs: ask for $gpus at most"
  fi
  for ((slot = 0; slot < n; slot++)); do list=$list$slot,; done
  read_gpu_nodes "${list%,}"
}

# check_launcher: sets launcher from LAUNCHER and refuses what it cannot start.
check_launcher() {
  case ${LAUNCH:-print} in print | ssh) ;; *) fail "LAUNCH is print or ssh, not $LAUNCH" ;; esac
  launcher=${LAUNCHER:-torchrun}
  if [ -z "${LAUNCHER:-}" ] && [ "$node_count:$per_node" = 1:1 ]; then launcher=python; fi
  case $launcher in
    torchrun) ;;
    python)
      [ "$node_count:$per_node" = 1:1 ] ||
        fail "LAUNCHER=python is one process, and GPU_NODES $list is more than one GPU: name one, or use torchrun"
      ;;
    deepspeed)
      local devices
      if [ -z "${dry_run:-}" ] && [ ! -x .venv/bin/deepspeed ] && ! command -v deepspeed >/dev/null; then
        fail "there is no deepspeed: bash setup.sh && .venv/bin/python -m pip install deepspeed, or LAUNCHER=torchrun"
      fi
      for devices in "${node_devices[@]}"; do
        case $devices in
          "") fail "LAUNCHER=deepspeed has to be told the GPUs by number, as in GPU_NODES=localhost:0,1" ;;
          *[!0-9,]*) fail "LAUNCHER=deepspeed knows GPUs by number, and CUDA_VISIBLE_DEVICES names them: $devices" ;;
        esac
      done
      ;;
    *) fail "LAUNCHER is torchrun, deepspeed or python, not $LAUNCHER" ;;
  esac
  check_gpus
  check_port
}

# check_gpus: refuses to start on slots of this machine where it has no GPU; a dry run prints its command, with a note.
no_gpu="there is no GPU to be seen here"
check_gpus() {
  local node
  if [ "${gpus:-some}" != 0 ] || wants_cpu; then return; fi
  for ((node = 0; node < node_count; node++)); do
    if [ -z "${node_slots[node]}" ] || ! is_here "${node_hosts[node]}"; then continue; fi
    if [ -n "${dry_run:-}" ]; then
      echo "${0##*/}: $no_gpu: the command is for a machine that has them" >&2
    elif starts_something; then
      fail "GPU_NODES $list: $no_gpu: write localhost for one process on the CPU, or start it where the GPUs are"
    fi
  done
}

# check_port: refuses to start on a port that is taken, where the first node is this machine.
check_port() {
  local host=${node_hosts[0]} port=${RDZV_PORT:-29400} python=.venv/bin/python
  if [ "$launcher" = deepspeed ]; then
    port=${RDZV_PORT:-29500} # its own default
  elif [ "$node_count" = 1 ]; then
    return # --standalone takes a free one
  fi
  if ! starts_something; then return; fi
  if is_here "$host"; then host=""; fi           # every address of this machine
  if [ ! -x "$python" ]; then python=python3; fi # setup.sh has not been here yet
  # To listen is the test, and not to connect: a proxy in between may answer for a machine.
  "$python" -c 'import errno, socket, sys
try:
    socket.create_server((sys.argv[1], 0)).close()
except OSError:
    sys.exit()  # another machine
try:
    socket.create_server(("", int(sys.argv[2]))).close()
except OSError as error:
    sys.exit(98 if error.errno == errno.EADDRINUSE else 0)' "$host" "$port" 2>/dev/null || [ $? != 98 ] ||
    fail "port $port of this machine is taken, by another run or program: set RDZV_PORT to a free one"
}

# -- commands ----------------------------------------------------------------------------------------------------------

# set_words NODE SCRIPT [FLAG]...: sets words, the command of one node: NAME=VALUE settings, launcher, script, flags.
set_words() {
  local node=$1 name include=""
  shift
  words=()
  # The documents set CUDA_ALLOC_CONF=expandable_segments, which nothing reads: this is the name, and the value.
  if [ -n "${PYTORCH_ALLOC_CONF+set}" ] && [ -z "${PYTORCH_CUDA_ALLOC_CONF+set}" ]; then
    words+=("PYTORCH_ALLOC_CONF=$PYTORCH_ALLOC_CONF") # the newer name
  else
    words+=("PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF-expandable_segments:True}")
  fi
  if [ "$launcher" = deepspeed ]; then # it sorts them, starts the other machines itself, and sets what they may see
    for ((node = 0; node < node_count; node++)); do
      include=${include:+$include@}${node_hosts[node]}:${node_devices[node]}
    done
    name=deepspeed
    if [ -x .venv/bin/deepspeed ]; then name=.venv/bin/deepspeed; fi
    words+=("$name" "--include=$include")
    if [ -n "${HOSTFILE:-}" ]; then words+=("--hostfile=$HOSTFILE"); fi
    if [ -n "${RDZV_PORT:-}" ]; then words+=("--master_port=$RDZV_PORT"); fi
    words+=("$@")
    return
  fi
  if ! one_command; then # a shell elsewhere does not have them
    for name in $(compgen -e | grep -E '^(NCCL_|GLOO_|HF_HOME$|HF_HUB_OFFLINE$|HF_ENDPOINT$|MODELSCOPE_(CACHE|ENDPOINT)$)' | sort); do
      words+=("$name=${!name}")
    done
  fi
  if [ -n "${node_devices[node]}" ]; then words+=("CUDA_VISIBLE_DEVICES=${node_devices[node]}"); fi
  words+=(.venv/bin/python)
  if [ "$launcher" = torchrun ]; then
    words+=(-m torch.distributed.run)
    if [ "$node_count" = 1 ]; then
      words+=(--standalone) # a free port
    else
      # not --rdzv-backend=c10d: it asks a machine for its own name, which is often 127.0.1.1, and ranks nodes by it
      words+=("--nnodes=$node_count" "--node-rank=$node")
      words+=("--master-addr=${node_hosts[0]}" "--master-port=${RDZV_PORT:-29400}")
    fi
    words+=("--nproc-per-node=$per_node")
  fi
  words+=("$@")
}

# one_command: whether one command, here, is all of it.
one_command() {
  [ "$launcher" = deepspeed ] || { [ "$node_count" = 1 ] && is_here "${node_hosts[0]}"; }
}

# starts_something: whether on_nodes starts processes, or has commands to print only.
starts_something() {
  [ -z "${dry_run:-}" ] && { one_command || [ "${LAUNCH:-print}" = ssh ]; }
}

# log_to FILE: the wrapper's output, and so the run's, goes to the end of a file as well.
log_to() {
  mkdir -p "$(dirname "$1")"
  # Ctrl-C is for the run, whose last words are still to be written: tee -i does not hear it.
  exec > >(exec tee -i -a "$1") 2> >(exec tee -i -a "$1" >&2)
}

# on_nodes SCRIPT [FLAG]...: the run on all nodes.  One on this machine alone takes the place of the wrapper.
on_nodes() {
  local node pids=()
  if one_command; then
    set_words 0 "$@"
    set_line "${words[@]}"
    echo "$line"
    if starts_something; then exec env "${words[@]}"; fi
    return
  fi
  for ((node = 0; node < node_count; node++)); do
    set_words "$node" "$@"
    echo "# on ${node_hosts[node]}:"
    set_line "${words[@]}"
    echo "$line"
    if ! starts_something; then continue; fi
    if is_here "${node_hosts[node]}"; then
      env "${words[@]}" &
    else # with a terminal, so that the run there ends when this ssh does
      local over_there=$line
      set_line cd "$PWD"
      ssh -tt -o BatchMode=yes "${node_hosts[node]}" "$line && $over_there" </dev/null &
    fi
    pids[node]=$!
  done
  if starts_something; then wait_for_all "${pids[@]}"; fi
}

# wait_for_all PID...: until all have ended well, or one has not: then the others are ended, and its exit code is ours.
wait_for_all() {
  local pid running=1 status=0
  trap 'kill "$@" 2>/dev/null; exit 130' INT TERM
  while [ -n "$running" ]; do
    running=""
    for pid in "$@"; do
      if kill -0 "$pid" 2>/dev/null; then
        running=1
      elif wait "$pid"; then
        :
      else
        status=$?
        echo "${0##*/}: a node ended with exit code $status: the others are ended too" >&2
        kill "$@" 2>/dev/null || true
        wait "$@" || true # bare, it would wait for the tee of log_to, which waits for the wrapper
        exit "$status"
      fi
    done
    if [ -n "$running" ]; then sleep 1; fi
  done
}
