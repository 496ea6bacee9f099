# The installer for Kubernetes: on the node itself, and from a privileged container as its DaemonSet
# has them.

DEPLOYED=/opt/embedshim/bin/containerd-shim-embed-v1
CONFIG=/etc/containerd/config.toml

# deploy CODE COMMAND: which ends with this code.
deploy() {
    local code=0
    archive/kubernetes/deploy.sh "$2" || code=$?
    [ $code = "$1" ]
}

# The same from a container, which outlives the restart of containerd.
deploy_from_a_pod() {
    # A machine that it shares gives it little.
    local PATIENCE=240
    local host=type=bind,src=/,dst=/host,options=rbind:ro
    local archive=type=bind,src=/checks/archive,dst=/embedshim,options=rbind:ro
    local run="busybox --install -s /bin; /embedshim/kubernetes/deploy.sh --host /host $2; echo code \$?"
    rm -f /run/pod.log
    ctr run --detach --snapshotter native --runtime io.containerd.runc.v2 --privileged --with-ns pid:/proc/1/ns/pid \
        --mount $host --mount $archive --log-uri file:///run/pod.log $IMAGE pod sh -c "$run"
    until_true grep '^code' /run/pod.log || true
    cat /run/pod.log
    grep "^code $1\$" /run/pod.log
    until_true is_stopped pod
    ctr task delete pod
    ctr container delete pod
}

containerd_pid() {
    systemctl show --property=MainPID --value containerd.service
}

# What deploy.sh changes, byte for byte.
node() {
    stat --format='%n %a %u:%g' $CONFIG
    # Most of these are not there.
    (find $CONFIG /opt /etc/embedshim /etc/systemd/system /run/embedshim /sys/fs/bpf/embedshim -type f,s 2>/dev/null || true) | sort |
        while read -r file; do echo "$file $([ -S "$file" ] || sha256sum <"$file")"; done
}

node_is_untouched() {
    node | diff /run/node -
    [ ! -e /opt/embedshim ]
    fails systemctl --quiet is-enabled embedshimd.socket
}

a_refused_or_failed_deployment_leaves_every_byte_as_it_was() {
    local drop_in=/etc/systemd/system/containerd.service.d
    deploy 3 install # beside the package
    dpkg --purge embedshim
    cp -a $CONFIG /run/config.toml
    echo 'nonsense = [' >>$CONFIG
    node >/run/node
    deploy 4 install
    node_is_untouched
    cp -a /run/config.toml $CONFIG
    # containerd starts only without our handler.
    mkdir -p $drop_in
    printf '[Service]\nExecStartPre=/bin/sh -c "! grep -q embedshim %s"\n' $CONFIG >$drop_in/test.conf
    systemctl daemon-reload
    node >/run/node
    deploy 1 install
    node_is_untouched
    systemctl is-active containerd.service
    rm -r $drop_in
    systemctl daemon-reload
    dpkg --install new.deb
}

a_deployment_is_upgraded_under_containers_and_its_removal_restores_every_byte() {
    local containerd before RUNTIME=$DEPLOYED
    dpkg --purge embedshim
    cp -a $CONFIG /run/config.toml
    node >/run/node
    containerd=$(containerd_pid)
    deploy_from_a_pod 0 install
    [ "$(containerd_pid)" != "$containerd" ]
    containerd config dump | grep 'runtimes.embedshim]'
    containerd config dump | grep "runtime_path = .$DEPLOYED"
    start_detached
    [ "$(readlink "/proc/$(main_pid)/exe")" = /opt/embedshim/bin/embedshimd ]

    # Again: nothing. Newer: the daemon alone.
    containerd=$(containerd_pid) before=$(main_pid)
    deploy 0 install
    [ "$(main_pid)" = "$before" ]
    cp /etc/hostname archive/share/doc/embedshim/newer
    (cd archive && find ./* -type f ! -name SHA256SUMS -exec sha256sum {} + >/run/sums && cp /run/sums SHA256SUMS)
    deploy 7 status
    deploy 0 install
    deploy 0 status
    [ "$(main_pid)" != "$before" ]
    [ "$(containerd_pid)" = "$containerd" ]
    containers_run_on
    exec_works

    deploy 5 remove
    [ "$(containerd_pid)" = "$containerd" ]
    containers_run_on
    codes_of_detached_arrive
    deploy 0 remove
    rm -r /etc/embedshim
    node_is_untouched
    cmp $CONFIG /run/config.toml
    fails pgrep embedshimd
    deploy 6 status
    dpkg --install new.deb
}
