//! Takes the right to touch anything away from a thread: it may compute, and take memory.
//!
//! Linux on x86-64 only; elsewhere the targets run without it.

/// What became of the attempt to lock a thread in.
pub fn enter() -> Result<(), std::io::Error> {
    imp::enter()
}

/// A call that was refused to this thread since the last time this was asked, by number.
pub fn refused() -> Option<i64> {
    imp::refused()
}

#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
mod imp {
    use std::{cell::Cell, io, sync::Once};

    use libc::{
        BPF_ABS, BPF_JEQ, BPF_JMP, BPF_K, BPF_LD, BPF_RET, BPF_W, SECCOMP_RET_ALLOW,
        SECCOMP_RET_TRAP, sock_filter, sock_fprog,
    };

    /// Everything that reads or changes something outside of the process, or starts another.
    const FORBIDDEN: [i64; 36] = [
        libc::SYS_open,
        libc::SYS_openat,
        libc::SYS_openat2,
        libc::SYS_creat,
        libc::SYS_execve,
        libc::SYS_execveat,
        libc::SYS_fork,
        libc::SYS_vfork,
        libc::SYS_clone,
        libc::SYS_clone3,
        libc::SYS_socket,
        libc::SYS_socketpair,
        libc::SYS_connect,
        libc::SYS_bind,
        libc::SYS_listen,
        libc::SYS_sendto,
        libc::SYS_sendmsg,
        libc::SYS_unlink,
        libc::SYS_unlinkat,
        libc::SYS_rename,
        libc::SYS_renameat,
        libc::SYS_renameat2,
        libc::SYS_mkdir,
        libc::SYS_mkdirat,
        libc::SYS_rmdir,
        libc::SYS_link,
        libc::SYS_linkat,
        libc::SYS_symlink,
        libc::SYS_symlinkat,
        libc::SYS_chmod,
        libc::SYS_fchmodat,
        libc::SYS_chown,
        libc::SYS_truncate,
        libc::SYS_kill,
        libc::SYS_ptrace,
        libc::SYS_mount,
    ];

    thread_local! {
        /// Of this thread, on which the trap is handled too. Neither lazy nor dropped, as a handler needs it.
        static REFUSED: Cell<Option<i64>> = const { Cell::new(None) };
    }

    /// Notes the call; it fails for its caller as if it were not permitted.
    extern "C" fn on_forbidden(
        _: libc::c_int,
        info: *mut libc::siginfo_t,
        context: *mut libc::c_void,
    ) {
        // SAFETY: the kernel passes both for a handler with SA_SIGINFO. The number of the call is the third
        // word of what follows signo, errno and code: address, then number (`_sigsys` of siginfo.h).
        unsafe {
            let call = info.cast::<u8>().add(24).cast::<i32>().read_unaligned();
            REFUSED.set(Some(call.into()));
            let context = context.cast::<libc::ucontext_t>();
            (*context).uc_mcontext.gregs[libc::REG_RAX as usize] = -i64::from(libc::EPERM);
        }
    }

    fn handle_traps() {
        static ONCE: Once = Once::new();
        ONCE.call_once(|| {
            // SAFETY: a handler that stores a number and sets a register.
            unsafe {
                let mut action: libc::sigaction = std::mem::zeroed();
                action.sa_sigaction = on_forbidden as *const () as usize;
                action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
                libc::sigaction(libc::SIGSYS, &action, std::ptr::null_mut());
            }
        });
    }

    pub fn enter() -> Result<(), io::Error> {
        handle_traps();
        let op = |code: u32, jt, jf, k| sock_filter { code: code as u16, jt, jf, k };
        // Loads the number of the call and compares it with each that is forbidden.
        let mut filter = vec![op(BPF_LD | BPF_W | BPF_ABS, 0, 0, 0)];
        for call in FORBIDDEN {
            filter.push(op(BPF_JMP | BPF_JEQ | BPF_K, 0, 1, call as u32));
            filter.push(op(BPF_RET | BPF_K, 0, 0, SECCOMP_RET_TRAP));
        }
        filter.push(op(BPF_RET | BPF_K, 0, 0, SECCOMP_RET_ALLOW));
        let program = sock_fprog { len: filter.len() as u16, filter: filter.as_mut_ptr() };
        // SAFETY: the program outlives the calls, which copy it. Only this thread is locked in.
        let entered = unsafe {
            libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
                && libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &program) == 0
        };
        if entered { Ok(()) } else { Err(io::Error::last_os_error()) }
    }

    pub fn refused() -> Option<i64> {
        REFUSED.take()
    }

    /// What a thread that is locked in cannot do, and that it is noted.
    #[test]
    fn files_processes_and_sockets_are_refused() {
        std::thread::spawn(|| {
            if let Err(error) = enter() {
                return eprintln!("NOT RUN: the system locks no thread in: {error}");
            }
            let denied = io::ErrorKind::PermissionDenied;
            assert_eq!(std::fs::File::open("/etc/passwd").unwrap_err().kind(), denied);
            // Not by `Command`, which blocks signals while it forks: the trap would end the process.
            // SAFETY: were it permitted, the child would leave at once.
            unsafe {
                let child = libc::syscall(libc::SYS_fork);
                if child == 0 {
                    libc::_exit(0);
                }
                assert_eq!((child, refused()), (-1, Some(libc::SYS_fork)));
            }
            assert_eq!(std::net::TcpListener::bind("127.0.0.1:0").unwrap_err().kind(), denied);
            assert_eq!(std::fs::remove_file("/tmp/no such file").unwrap_err().kind(), denied);
        })
        .join()
        .unwrap();
    }
}

#[cfg(not(all(target_os = "linux", target_arch = "x86_64")))]
mod imp {
    pub fn enter() -> Result<(), std::io::Error> {
        Err(std::io::ErrorKind::Unsupported.into())
    }

    pub fn refused() -> Option<i64> {
        None
    }
}
