//! What a child does between `fork` and its end or its program, and that program's machine code.
//! The only unsafe code of the sandboxes.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::sched::{CloneFlags, setns, unshare};
use rustix::process::{Gid, Uid};
use rustix::thread::{set_no_new_privs, set_thread_groups, set_thread_res_gid, set_thread_res_uid};

use super::plan::{Plan, Step};
use crate::sys::{fork_unseen, own_received};

/// The name that operators see.
const NAME: &CStr = c"embedshim-pod";
/// No kernel has a capability of this number.
const CAPABILITIES: libc::c_ulong = 64;

/// What the daemon and a child tell each other: the child by `report` how far it is, the daemon by
/// `gate` that it may go on.
pub(super) struct Ends<'a> {
    pub(super) report: BorrowedFd<'a>,
    pub(super) gate: BorrowedFd<'a>,
    /// Of the daemon's, closed by the child: it must not hold its own gate open.
    pub(super) others: [RawFd; 2],
}

/// Starts a child that does what the plan says. Its end is to be waited for with
/// [`crate::sys::wait_unseen`].
pub(super) fn start(plan: &Plan<'_>, ends: &Ends<'_>) -> io::Result<libc::pid_t> {
    // SAFETY: the child makes system calls alone, with what was allocated before, and ends without
    // a destructor or handler.
    match unsafe { fork_unseen(0) }? {
        0 => run(plan, ends),
        pid => Ok(pid),
    }
}

/// In the child: only calls that are safe after the fork of a process with threads.
fn run(plan: &Plan<'_>, ends: &Ends<'_>) -> ! {
    for fd in ends.others {
        // SAFETY: the child's own copy of a descriptor, which nothing else in it uses.
        unsafe { libc::close(fd) };
    }
    let done = prepare(plan);
    if let Err((step, error)) = done {
        report(ends, [step as i32, error as i32]);
        end();
    }
    let Some(init) = &plan.init else {
        report(ends, [0, 0]);
        pass(ends);
        end();
    };
    // Not the C library's: it has handlers of its own.
    let (flags, none): (libc::c_long, libc::c_long) = (libc::SIGCHLD.into(), 0);
    // SAFETY: without CLONE_VM and a stack it returns twice, as fork does; both make system calls
    // alone.
    let pid = unsafe { libc::syscall(libc::SYS_clone, flags, none, none, none, none) };
    match i32::try_from(pid) {
        Ok(0) => {
            if pass(ends) {
                let error = become_init(init.program, init.ids);
                report(ends, [Step::Execute as i32, error]);
            }
        }
        Ok(pid) if pid > 0 => {
            report(ends, [0, pid]);
            pass(ends);
        }
        _ => report(ends, [Step::Fork as i32, Errno::last_raw()]),
    }
    end()
}

/// Joins and makes namespaces, in the one order in which the kernel lets it.
fn prepare(plan: &Plan<'_>) -> Result<(), (Step, Errno)> {
    let _ = nix::unistd::setsid();
    // While it has the rights of the node's root.
    if let Some(init) = &plan.init {
        setns(init.mounts, CloneFlags::CLONE_NEWNS).map_err(|error| (Step::Mounts, error))?;
    }
    if let Some(users) = plan.users {
        setns(users, CloneFlags::CLONE_NEWUSER).map_err(|error| (Step::Users, error))?;
    }
    if let Some(network) = plan.network {
        setns(network, CloneFlags::CLONE_NEWNET).map_err(|error| (Step::Network, error))?;
    }
    unshare(plan.own).map_err(|error| (Step::Unshare, error))
}

/// Gives up all rights and becomes the program; returns only the error of that.
fn become_init(program: BorrowedFd<'_>, ids: (u32, u32)) -> i32 {
    if let Err(errno) = give_up(ids) {
        return errno.raw_os_error();
    }
    let arguments = [NAME.as_ptr(), std::ptr::null()];
    let environment = [std::ptr::null::<libc::c_char>()];
    // SAFETY: execveat reads strings and arrays that end with a null pointer and live through it.
    unsafe {
        libc::syscall(
            libc::SYS_execveat,
            program.as_raw_fd(),
            c"".as_ptr(),
            arguments.as_ptr(),
            environment.as_ptr(),
            libc::AT_EMPTY_PATH,
        )
    };
    Errno::last_raw()
}

/// What only its own user may not, it could not either: the rights are dropped by the change of the
/// user and by the execution, and the bounding set keeps them from coming back.
fn give_up((user, group): (u32, u32)) -> rustix::io::Result<()> {
    rustix::process::chdir(c"/")?;
    // SAFETY: no handler is installed. It survives the execution: the kernel reaps its children.
    unsafe { libc::signal(libc::SIGCHLD, libc::SIG_IGN) };
    let none: libc::c_ulong = 0;
    for capability in 0..CAPABILITIES {
        // SAFETY: prctl with plain numbers; it touches no memory. An unknown capability is refused.
        unsafe { libc::prctl(libc::PR_CAPBSET_DROP, capability, none, none, none) };
    }
    // These change one thread, which is the only one here; the C library would look for others.
    set_thread_groups(&[])?;
    let group = Gid::from_raw(group);
    set_thread_res_gid(group, group, group)?;
    let user = Uid::from_raw(user);
    set_thread_res_uid(user, user, user)?;
    set_no_new_privs(true)
}

fn report(ends: &Ends<'_>, words: [i32; 2]) {
    let bytes = words.map(i32::to_ne_bytes);
    let _ = nix::unistd::write(ends.report, bytes.as_flattened());
}

/// Waits for the daemon's word; whether it came. Not if the daemon has died.
fn pass(ends: &Ends<'_>) -> bool {
    let mut word = [0];
    loop {
        match nix::unistd::read(ends.gate, &mut word) {
            Err(Errno::EINTR) => {}
            read => return read == Ok(1),
        }
    }
}

fn end() -> ! {
    // SAFETY: ends this process without running anything of the parent's.
    unsafe { libc::_exit(0) }
}

/// The user namespace that a namespace belongs to (`NS_GET_USERNS`, Linux 4.9).
pub(super) fn owner_of(namespace: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    const NS_GET_USERNS: libc::Ioctl = 0xB701;
    // SAFETY: NS_GET_USERNS takes no argument; the descriptor is borrowed and so open.
    let fd = unsafe { libc::ioctl(namespace.as_raw_fd(), NS_GET_USERNS) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(own_received(fd))
}

/// The machine of ELF, and the program's code; `None` where there is none.
#[cfg_attr(
    any(target_arch = "x86_64", target_arch = "aarch64"),
    expect(clippy::unnecessary_wraps, reason = "other processors have no program")
)]
pub(super) fn code() -> Option<(u16, &'static [u8])> {
    #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
    {
        #[cfg(target_arch = "x86_64")]
        const MACHINE: u16 = 62;
        #[cfg(target_arch = "aarch64")]
        const MACHINE: u16 = 183;
        let (begin, end) = (&raw const embedshim_pod_begin, &raw const embedshim_pod_end);
        // SAFETY: both symbols are in the assembly below, in one section that is never written, the
        // second behind the first.
        let length = unsafe { end.offset_from_unsigned(begin) };
        // SAFETY: all of these bytes are initialised, and never written.
        let code = unsafe { std::slice::from_raw_parts(begin, length) };
        Some((MACHINE, code))
    }
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    None
}

#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
// SAFETY: declarations of the two bytes that the assembly below defines.
unsafe extern "C" {
    static embedshim_pod_begin: u8;
    static embedshim_pod_end: u8;
}

// Its name, no core dumps and no tracing by its own user; no descriptors; a filter of system calls;
// then it waits for signals, again and again.
#[cfg(target_arch = "x86_64")]
std::arch::global_asm!(
    ".pushsection .rodata.embedshim_pod,\"a\",@progbits",
    ".globl embedshim_pod_begin",
    ".globl embedshim_pod_end",
    "embedshim_pod_begin:",
    // prctl(PR_SET_NAME, name)
    "mov eax, 157",
    "mov edi, 15",
    "lea rsi, [rip + 4f]",
    "syscall",
    // prctl(PR_SET_DUMPABLE, 0)
    "mov eax, 157",
    "mov edi, 4",
    "xor esi, esi",
    "syscall",
    // close(2), close(1), close(0)
    "mov ebx, 2",
    "2: mov eax, 3",
    "mov edi, ebx",
    "syscall",
    "dec ebx",
    "jns 2b",
    // prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, {8, filter})
    "lea rax, [rip + 5f]",
    "push rax",
    "push 8",
    "mov eax, 157",
    "mov edi, 22",
    "mov esi, 2",
    "mov rdx, rsp",
    "syscall",
    // pause()
    "3: mov eax, 34",
    "syscall",
    "jmp 3b",
    "4: .asciz \"embedshim-pod\"",
    ".balign 8",
    // The architecture.
    "5: .short 0x20; .byte 0, 0; .long 4",
    ".short 0x15; .byte 0, 4; .long 0xc000003e",
    // The call: pause, rt_sigreturn, restart_syscall.
    ".short 0x20; .byte 0, 0; .long 0",
    ".short 0x15; .byte 3, 0; .long 34",
    ".short 0x15; .byte 2, 0; .long 15",
    ".short 0x15; .byte 1, 0; .long 219",
    // SECCOMP_RET_KILL_PROCESS, SECCOMP_RET_ALLOW.
    ".short 0x06; .byte 0, 0; .long 0x80000000",
    ".short 0x06; .byte 0, 0; .long 0x7fff0000",
    "embedshim_pod_end:",
    ".popsection",
);

// The same. There is no pause here: ppoll of nothing without an end.
#[cfg(target_arch = "aarch64")]
std::arch::global_asm!(
    ".pushsection .rodata.embedshim_pod,\"a\",@progbits",
    ".balign 8",
    ".globl embedshim_pod_begin",
    ".globl embedshim_pod_end",
    "embedshim_pod_begin:",
    "mov x8, #167",
    "mov x0, #15",
    "adr x1, 4f",
    "svc #0",
    "mov x8, #167",
    "mov x0, #4",
    "mov x1, #0",
    "svc #0",
    "mov x19, #2",
    "2: mov x8, #57",
    "mov x0, x19",
    "svc #0",
    "subs x19, x19, #1",
    "b.pl 2b",
    "sub sp, sp, #16",
    "mov x9, #8",
    "str x9, [sp]",
    "adr x9, 5f",
    "str x9, [sp, #8]",
    "mov x8, #167",
    "mov x0, #22",
    "mov x1, #2",
    "mov x2, sp",
    "svc #0",
    "3: mov x8, #73",
    "mov x0, #0",
    "mov x1, #0",
    "mov x2, #0",
    "mov x3, #0",
    "mov x4, #0",
    "svc #0",
    "b 3b",
    "4: .asciz \"embedshim-pod\"",
    ".balign 8",
    "5: .short 0x20; .byte 0, 0; .long 4",
    ".short 0x15; .byte 0, 4; .long 0xc00000b7",
    ".short 0x20; .byte 0, 0; .long 0",
    ".short 0x15; .byte 3, 0; .long 73",
    ".short 0x15; .byte 2, 0; .long 139",
    ".short 0x15; .byte 1, 0; .long 128",
    ".short 0x06; .byte 0, 0; .long 0x80000000",
    ".short 0x06; .byte 0, 0; .long 0x7fff0000",
    "embedshim_pod_end:",
    ".popsection",
);
