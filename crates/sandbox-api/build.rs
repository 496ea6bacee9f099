//! Generates the messages of `proto/` in Rust, by a parser in Rust: no `protoc` is needed.

fn main() {
    protobuf_codegen::Codegen::new()
        .pure()
        .include("proto")
        // Without descriptions of the messages, which nothing here asks for.
        .customize(protobuf_codegen::Customize::default().lite_runtime(true))
        .inputs(["proto/controller.proto", "proto/cri.proto"])
        .cargo_out_dir("messages")
        .run_from_script();
}
