//! The manifests in `packaging/kubernetes`, read as the API server of the oldest supported
//! Kubernetes reads them: by its types, and without a field that these do not have.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test fails by panicking"
)]

use std::fs;
use std::path::{Path, PathBuf};

use k8s_openapi::api::apps::v1::DaemonSet;
use k8s_openapi::api::core::v1::Namespace;
use k8s_openapi::api::node::v1::RuntimeClass;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use testbed::products::workspace;

/// What the placeholder of the image is called everywhere.
const IMAGE: &str = "registry.example/embedshim-deploy";

fn directory() -> PathBuf {
    workspace().join("packaging/kubernetes")
}

fn read(path: &Path) -> Value {
    let text = fs::read_to_string(path).unwrap();
    serde_saphyr::from_str(&text).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// Each YAML file below the directory with what is in it.
fn manifests(directory: &Path) -> Vec<(PathBuf, Value)> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(manifests(&path));
        } else if path
            .extension()
            .is_some_and(|extension| extension == "yaml")
        {
            let value = read(&path);
            found.push((path, value));
        }
    }
    found
}

/// The value of a type, of which every field of the document is one.
fn strictly<T: DeserializeOwned + Serialize>(value: &Value) -> Result<T, String> {
    let typed: T = serde_json::from_value(value.clone()).map_err(|error| error.to_string())?;
    let known = serde_json::to_value(&typed).map_err(|error| error.to_string())?;
    match unknown(value, &known, "") {
        Some(path) => Err(format!("there is no field {path}")),
        None => Ok(typed),
    }
}

/// What is in a document and not in what its type knows of it.
fn unknown(document: &Value, known: &Value, at: &str) -> Option<String> {
    match (document, known) {
        (Value::Object(document), Value::Object(known)) => {
            document.iter().find_map(|(key, value)| {
                let at = format!("{at}.{key}");
                match known.get(key) {
                    Some(known) => unknown(value, known, &at),
                    None => Some(at),
                }
            })
        }
        (Value::Array(document), Value::Array(known)) if document.len() == known.len() => document
            .iter()
            .zip(known)
            .find_map(|(value, known)| unknown(value, known, &format!("{at}[]"))),
        _ => (document != known).then(|| at.to_owned()),
    }
}

/// Checks a document by the type that it says it is of.
fn check(value: &Value) -> Result<(), String> {
    let kind = (value["apiVersion"].as_str(), value["kind"].as_str());
    match kind {
        (Some("v1"), Some("Namespace")) => strictly::<Namespace>(value).map(drop),
        (Some("apps/v1"), Some("DaemonSet")) => strictly::<DaemonSet>(value).map(drop),
        (Some("node.k8s.io/v1"), Some("RuntimeClass")) => strictly::<RuntimeClass>(value).map(drop),
        _ => Err(format!("no such object is expected: {kind:?}")),
    }
}

#[test]
fn every_manifest_is_one_that_the_api_server_takes() {
    let mut kinds = Vec::new();
    for (path, value) in manifests(&directory()) {
        if path.ends_with("kustomization.yaml") {
            continue;
        }
        check(&value).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        kinds.push(value["kind"].as_str().unwrap().to_owned());
    }
    kinds.sort();
    assert_eq!(
        kinds,
        [
            "DaemonSet",
            "DaemonSet",
            "Namespace",
            "RuntimeClass",
            "RuntimeClass"
        ]
    );
}

#[test]
fn a_field_that_the_api_does_not_have_is_found() {
    let mut value = read(&directory().join("daemonset.yaml"));
    assert_eq!(check(&value), Ok(()));
    value["spec"]["template"]["spec"]["hostPid"] = Value::Bool(true);
    assert_eq!(
        check(&value),
        Err("there is no field .spec.template.spec.hostPid".to_owned())
    );
    value["spec"]["template"]["spec"] = Value::Bool(true);
    assert!(check(&value).is_err());
}

#[test]
fn both_daemonsets_reach_the_node_and_nothing_of_the_cluster() {
    for (path, command) in [
        ("daemonset.yaml", "install"),
        ("remove/daemonset.yaml", "remove"),
    ] {
        let set: DaemonSet = strictly(&read(&directory().join(path))).unwrap();
        let spec = set.spec.unwrap();
        let labels = spec.template.metadata.unwrap().labels;
        assert_eq!(spec.selector.match_labels, labels, "{path}");
        let pod = spec.template.spec.unwrap();
        assert_eq!(pod.host_pid, Some(true), "{path}");
        assert_eq!(pod.automount_service_account_token, Some(false), "{path}");
        assert_eq!(pod.service_account_name, None, "{path}");
        let [container] = pod.containers.as_slice() else {
            panic!("{path}: not one container");
        };
        let arguments = container.args.as_deref().unwrap_or_default();
        assert_eq!(arguments, ["--host", "/host", "--stay", command], "{path}");
        assert!(
            container.image.as_ref().unwrap().starts_with(IMAGE),
            "{path}"
        );
        assert!(container.readiness_probe.is_some(), "{path}");
        let rights = container.security_context.as_ref().unwrap();
        assert_eq!(rights.privileged, Some(true), "{path}");
        let [mount] = container.volume_mounts.as_deref().unwrap() else {
            panic!("{path}: not one volume");
        };
        assert_eq!(
            (mount.mount_path.as_str(), mount.read_only),
            ("/host", Some(true)),
            "{path}"
        );
    }
}

#[test]
fn a_runtime_class_names_the_handler_that_the_script_configures() {
    let script = fs::read_to_string(directory().join("deploy.sh")).unwrap();
    let class: RuntimeClass = strictly(&read(&directory().join("runtimeclass.yaml"))).unwrap();
    assert!(script.contains(&format!("\nHANDLER={}\n", class.handler)));
}

#[test]
fn a_kustomization_names_files_that_are_there_and_the_image_that_they_have() {
    for (path, value) in manifests(&directory()) {
        if !path.ends_with("kustomization.yaml") {
            continue;
        }
        let fields: Vec<&str> = value
            .as_object()
            .unwrap()
            .keys()
            .map(String::as_str)
            .collect();
        assert_eq!(fields.len(), 4, "{}: {fields:?}", path.display());
        assert_eq!(value["apiVersion"], "kustomize.config.k8s.io/v1beta1");
        assert_eq!(value["kind"], "Kustomization");
        for resource in value["resources"].as_array().unwrap() {
            let file = path.with_file_name(resource.as_str().unwrap());
            assert!(file.is_file(), "{}", file.display());
        }
        assert_eq!(value["images"][0]["name"], IMAGE);
        // The version that everything has.
        let manifest = fs::read_to_string(workspace().join("Cargo.toml")).unwrap();
        let tag = value["images"][0]["newTag"].as_str().unwrap();
        assert!(
            manifest.contains(&format!("\nversion = \"{tag}\"\n")),
            "{tag}"
        );
    }
}
