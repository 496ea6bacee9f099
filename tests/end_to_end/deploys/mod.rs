//! The installer for Kubernetes, `packaging/kubernetes/deploy.sh`, on a node in namespaces of its
//! own: with a real containerd of each release, and a stand-in of `systemctl`. What it does under
//! systemd and with containers is tested in a guest (`tests/systemd`).

mod node;

use anyhow::ensure;
use embedshim_tests::{Stage, Test};
use testbed::products::workspace;

use crate::tests;
use node::{CONFIG, Node};

pub(crate) const TESTS: [Test; 8] = tests!(EmbedshimOnly:
    an_installation_adds_one_handler_and_its_removal_restores_every_byte,
    a_second_installation_changes_nothing_and_restarts_nothing,
    a_configuration_that_containerd_refuses_is_left_alone,
    an_installation_that_fails_leaves_every_byte_as_it_was,
    an_installation_that_is_killed_is_undone_or_done_by_the_next_run,
    a_removal_is_refused_while_there_are_containers,
    a_pod_with_the_nodes_root_installs_what_the_node_itself_would,
    the_examples_add_a_handler_and_lose_none,
);

/// What an operator has written, without an end of the last line.
const WRITTEN: &str = "# by hand\nversion = 2\n\n[plugins.\"io.containerd.grpc.v1.cri\"]\n  \
    sandbox_image = \"own/pause:1\"\n[plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.runc]\n  \
    runtime_type = \"io.containerd.runc.v2\"\n[plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.runc.options]\n  \
    SystemdCgroup = true";
const IMPORTS: &str =
    "version = 2\nimports = [\n  # all of them\n  \"/etc/containerd/conf.d/*.toml\",\n]\n";

fn dump(node: &Node) -> anyhow::Result<String> {
    node.succeed("containerd --config /etc/containerd/config.toml config dump 2>/dev/null")
}

/// Of no configuration, one that is edited, and one that imports a directory.
fn an_installation_adds_one_handler_and_its_removal_restores_every_byte(
    stage: &Stage,
) -> anyhow::Result<()> {
    let imports = format!(
        "{IMPORTS}{}",
        WRITTEN.trim_start_matches("# by hand\nversion = 2\n")
    );
    for config in [
        None,
        Some(WRITTEN),
        Some(imports.as_str()),
        Some("# nothing\n"),
    ] {
        let node = Node::new(stage, config)?;
        node.succeed("mkdir -p /etc/containerd/conf.d")?;
        let before = node.files()?;
        node.deploy("status", 6)?;
        node.deploy("install", 0)?;
        node.deploy("status", 0)?;
        let dumped = dump(&node)?;
        ensure!(
            dumped.contains("containerd.runtimes.embedshim]")
                && dumped.contains("/opt/embedshim/bin/containerd-shim-embed-v1"),
            "{dumped}"
        );
        if config.is_some_and(|config| config.contains("own/pause")) {
            ensure!(dumped.contains("own/pause:1"), "{dumped}");
            ensure!(
                dumped.matches("SystemdCgroup = true").count() == 2,
                "{dumped}"
            );
        }
        ensure!(node.restarts()? == 1, "{} restarts", node.restarts()?);
        node.deploy("remove", 0)?;
        node.deploy("status", 6)?;
        // The configuration of embedshim itself stays, as with install.sh.
        node.succeed("rm -r /etc/embedshim")?;
        node.expect_files(&before, "afterwards")?;
        if config.is_some() {
            ensure!(!dump(&node)?.contains("embedshim"), "the handler is left");
        }
    }
    Ok(())
}

fn a_second_installation_changes_nothing_and_restarts_nothing(stage: &Stage) -> anyhow::Result<()> {
    let node = Node::new(stage, Some(WRITTEN))?;
    node.deploy("install", 0)?;
    let files = node.files()?;
    let said = node.deploy("install", 0)?;
    ensure!(said.contains("nothing to do"), "{said}");
    node.expect_files(&files, &said)?;
    ensure!(node.restarts()? == 1, "{said}");
    // Newer programs are installed, and containerd has nothing to do with it.
    node.change_archive()?;
    let said = node.deploy("status", 7)?;
    ensure!(said.contains("another version"), "{said}");
    node.deploy("install", 0)?;
    ensure!(node.restarts()? == 1, "containerd was restarted");
    node.succeed("test -f /opt/embedshim/share/doc/embedshim/new.md")?;
    // What an operator writes beside it is kept, and what is lost comes back.
    node.succeed(&format!("echo '# after' >> {CONFIG}"))?;
    node.deploy("install", 0)?;
    ensure!(node.restarts()? == 1, "containerd was restarted");
    // A directory that is imported by now does not move the handler.
    node.succeed(&format!(
        "sed -i 's#^version.*#&\\nimports = [\"/etc/containerd/conf.d/*.toml\"]#' {CONFIG}"
    ))?;
    node.deploy("install", 0)?;
    ensure!(node.restarts()? == 1, "containerd was restarted");
    node.change_archive()?;
    node.deploy("install", 0)?;
    node.deploy("remove", 0)?;
    let left = node.succeed(&format!("cat {CONFIG}"))?;
    ensure!(
        left.contains("conf.d") && !left.contains("embedshim"),
        "{left}"
    );
    node.write(CONFIG, WRITTEN)?;
    node.deploy("install", 0)?;
    let restarts = node.restarts()?;
    node.write(CONFIG, &format!("{WRITTEN}\n# rewritten\n"))?;
    node.deploy("status", 7)?;
    node.deploy("install", 0)?;
    ensure!(
        node.restarts()? == restarts + 1,
        "containerd was not restarted"
    );
    node.deploy("remove", 0)?;
    let left = node.succeed(&format!("cat {CONFIG}"))?;
    ensure!(left == format!("{WRITTEN}\n# rewritten\n"), "{left}");
    Ok(())
}

fn a_configuration_that_containerd_refuses_is_left_alone(stage: &Stage) -> anyhow::Result<()> {
    let node = Node::new(stage, Some(WRITTEN))?;
    let hand_made = format!(
        "{WRITTEN}\n[plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.embedshim]\n  \
         runtime_type = \"io.containerd.runc.v2\"\n"
    );
    let disabled = WRITTEN.replace(
        "version = 2",
        "version = 2\ndisabled_plugins = [\"io.containerd.grpc.v1.cri\"]",
    );
    for (config, code) in [
        ("version = 2\nnonsense = [", 4),
        // Of version 1.
        ("[plugins.cri]\n  sandbox_image = \"own/pause:1\"\n", 4),
        (hand_made.as_str(), 4),
        (disabled.as_str(), 3),
    ] {
        node.write(CONFIG, config)?;
        let before = node.files()?;
        node.deploy("install", code)?;
        node.expect_files(&before, config)?;
    }
    node.write(CONFIG, WRITTEN)?;
    let before = node.files()?;
    node.succeed("echo mixed > /run/stand-in/kill-mode")?;
    node.deploy("install", 3)?;
    node.succeed("rm /run/stand-in/kill-mode && chmod 777 /opt")?;
    node.deploy("install", 3)?;
    node.succeed("chmod 755 /opt")?;
    // Links that would lead elsewhere.
    node.succeed("ln -s /var/tmp /opt/embedshim")?;
    node.deploy("install", 3)?;
    node.succeed("rm /opt/embedshim && mkdir /opt/embedshim && ln -s /etc /opt/embedshim/bin")?;
    node.deploy("install", 3)?;
    node.succeed("rm /opt/embedshim/bin && rmdir /opt/embedshim")?;
    node.deploy("--prefix '/opt/a b/embedshim' install", 2)?;
    node.deploy("--prefix /opt/../embedshim install", 2)?;
    node.deploy("--prefix /usr/local install", 2)?;
    node.expect_files(&before, "afterwards")?;
    ensure!(node.restarts()? == 0, "containerd was restarted");
    Ok(())
}

fn an_installation_that_fails_leaves_every_byte_as_it_was(stage: &Stage) -> anyhow::Result<()> {
    let node = Node::new(stage, Some(WRITTEN))?;
    let before = node.files()?;
    // containerd does not start with it, and does without.
    node.succeed("echo with > /run/stand-in/fails")?;
    let said = node.deploy("install", 1)?;
    ensure!(said.contains("everything is as it was"), "{said}");
    node.expect_files(&before, "afterwards")?;
    ensure!(node.restarts()? == 2, "{said}");
    node.succeed("ctr version")?;
    // The file is damaged after the checks.
    node.succeed("rm /run/stand-in/fails")?;
    let damage = node.archive().join("share/doc/embedshim/operating.md");
    std::fs::write(damage, "something else")?;
    node.deploy("install", 1)?;
    node.expect_files(&before, "afterwards")?;
    // A removal that fails.
    node.change_archive()?;
    node.deploy("install", 0)?;
    let installed = node.files()?;
    node.succeed("echo without > /run/stand-in/fails")?;
    node.deploy("remove", 1)?;
    node.expect_files(&installed, "afterwards")?;
    node.deploy("status", 0)?;
    Ok(())
}

fn an_installation_that_is_killed_is_undone_or_done_by_the_next_run(
    stage: &Stage,
) -> anyhow::Result<()> {
    let node = Node::new(stage, Some(WRITTEN))?;
    node.deploy("install", 0)?;
    let installed = node.files()?;
    node.deploy("remove", 0)?;
    node.succeed("rm -r /etc/embedshim")?;
    let removed = node.files()?;
    let kill_at = |step: u32, command: &str| {
        node.succeed(&format!(
            "echo {step} > /run/stand-in/kill-at; echo 0 > /run/stand-in/count"
        ))?;
        let script = node.archive().join("kubernetes/deploy.sh");
        let finished = node.run(&format!("{} {command}", script.display()))?;
        node.succeed("/usr/bin/rm /run/stand-in/kill-at")?;
        anyhow::Ok(finished.code == Some(0))
    };
    let mut steps = 0;
    // Every third step is killed, and after every second of them the operator changes their mind.
    for (round, step) in (1..).step_by(3).enumerate() {
        let is_done = kill_at(step, "install")?;
        if !is_done && round % 2 == 1 {
            node.deploy("remove", 0)?;
            let _ = node.run("rm -r /etc/embedshim")?;
            node.expect_files(&removed, &format!("step {step}"))?;
            continue;
        }
        node.deploy("install", 0)?;
        node.deploy("status", 0)?;
        node.expect_files(&installed, &format!("step {step}"))?;
        if is_done {
            steps = step;
            break;
        }
        kill_at(step, "remove")?;
        node.deploy("remove", 0)?;
        node.succeed("rm -r /etc/embedshim")?;
        node.expect_files(&removed, &format!("step {step} of a removal"))?;
    }
    ensure!(steps > 15, "only {steps} steps");
    Ok(())
}

fn a_removal_is_refused_while_there_are_containers(stage: &Stage) -> anyhow::Result<()> {
    let node = Node::new(stage, Some(WRITTEN))?;
    // A configuration elsewhere stays there.
    node.succeed("mkdir /etc/own && mv /etc/containerd/config.toml /etc/own/ && ln -s /etc/own/config.toml /etc/containerd/")?;
    node.deploy("install", 0)?;
    for record in ["tasks/k8s.io:c.json", "sandboxes/k8s.io:p.json"] {
        let directory = record.split('/').next().unwrap();
        node.succeed(&format!(
            "mkdir -p /run/embedshim/{directory} && touch /run/embedshim/{record}"
        ))?;
        let before = node.files()?;
        let said = node.deploy("remove", 5)?;
        ensure!(said.contains("1 containers or pods"), "{said}");
        node.expect_files(&before, &said)?;
        ensure!(node.restarts()? == 1, "{said}");
        node.succeed(&format!("rm /run/embedshim/{record}"))?;
    }
    node.deploy("remove", 0)?;
    let left = node.succeed(&format!("readlink {CONFIG} && cat /etc/own/config.toml"))?;
    ensure!(left == format!("/etc/own/config.toml\n{WRITTEN}"), "{left}");
    Ok(())
}

/// By `nsenter`, with the archive in no directory of the node.
fn a_pod_with_the_nodes_root_installs_what_the_node_itself_would(
    stage: &Stage,
) -> anyhow::Result<()> {
    let node = Node::new(stage, Some(WRITTEN))?;
    node.deploy("install", 0)?;
    let installed = node.files()?;
    node.deploy("remove", 0)?;
    node.succeed("rm -r /etc/embedshim")?;
    let removed = node.files()?;
    let archive = node.archive().display().to_string();
    let in_pod = |words: &str, code: i32| {
        let finished = node.run(&format!(
            "unshare --mount sh -c 'mkdir -p /run/pod/host && mount -t tmpfs tmpfs /run/pod && \
             mkdir /run/pod/host /run/pod/embedshim && cp -R {archive}/. /run/pod/embedshim && \
             mount --rbind / /run/pod/host && \
             exec /run/pod/embedshim/kubernetes/deploy.sh {words}'; \
             code=$?; rmdir /run/pod/host /run/pod; exit $code"
        ))?;
        ensure!(finished.code == Some(code), "{words}: {finished:?}");
        Ok(())
    };
    in_pod("--host /run/pod/host status", 6)?;
    in_pod("--host /run/pod install", 3)?;
    in_pod("--host /run/pod/host install", 0)?;
    in_pod("--host /run/pod/host status", 0)?;
    node.expect_files(&installed, "afterwards")?;
    in_pod("--host /run/pod/host install", 0)?;
    ensure!(node.restarts()? == 3, "containerd was restarted");
    in_pod("--host /run/pod/host remove", 0)?;
    node.succeed("rm -r /etc/embedshim")?;
    node.expect_files(&removed, "afterwards")?;
    Ok(())
}

/// That of version 3 also as a file of its own.
fn the_examples_add_a_handler_and_lose_none(stage: &Stage) -> anyhow::Result<()> {
    let example = |name: &str| {
        let path = workspace().join("packaging/examples").join(name);
        std::fs::read_to_string(path)
    };
    let two = format!("version = 2\n{}", example("containerd.toml")?);
    let node = Node::new(stage, Some(&two))?;
    let expect = |what: &str| {
        let dumped = dump(&node)?;
        for handler in ["embedshim", "runc"] {
            let table = format!("containerd.runtimes.{handler}]");
            ensure!(dumped.contains(&table), "{what}: {dumped}");
        }
        ensure!(
            dumped.contains("/usr/bin/containerd-shim-embed-v1"),
            "{what}: {dumped}"
        );
        Ok(())
    };
    expect("version 2")?;
    let version = node.succeed("containerd --version")?;
    if version.contains("/v2 ") {
        let three = example("containerd-v3.toml")?;
        node.write(CONFIG, &three)?;
        expect("version 3")?;
        node.succeed("mkdir /etc/containerd/conf.d")?;
        node.write("/etc/containerd/conf.d/embedshim.toml", &three)?;
        // From 2.3 on no imported file may be newer than the one that imports it.
        node.write(CONFIG, &IMPORTS.replace("version = 2", "version = 3"))?;
        expect("imported")?;
    }
    Ok(())
}
